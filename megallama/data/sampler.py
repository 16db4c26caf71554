"""The order of samples: pure functions of the seed and a position, with nothing stored and no torch.

A split is one stream of tokens. Window k covers tokens [k*S, k*S + S + 1) of the stream, S the sequence length:
neighbours overlap by one token, so every token but the first is predicted exactly once, and a tail shorter than S + 1
is dropped. Sample k of a run is a window that depends on (seed, k) alone, never on ranks or batch sizes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

FEISTEL_ROUNDS = 8
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Sampler:
    """Visits all windows once per epoch, in an order drawn anew from (seed, epoch)."""

    num_windows: int
    seed: int
    name: str = ""
    """Of a source of a mixture: sources of one size have orders of their own."""

    def window(self, sample: int) -> int:
        """Window of sample `sample` of the run, counted from 0 over all epochs."""
        epoch, index = divmod(sample, self.num_windows)
        return permuted(index, self.num_windows, f"{self.seed}{self.name and f':{self.name}'}/{epoch}")


def num_windows(num_tokens: int, sequence_length: int) -> int:
    """Windows in a stream of `num_tokens` tokens."""
    return max(num_tokens - 1, 0) // sequence_length


def micro_batch_indices(
    first_sample: int, micro_batch: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> range:
    """Samples of the run in micro-batch number `micro_batch` of data-parallel rank `dp_rank`.

    `first_sample` is the number of samples consumed before the step (layout.budget.samples_at_step).
    Over all ranks and micro-batches of a step these are the samples from first_sample on, without gap or repetition.
    """
    start = first_sample + (micro_batch * dp_size + dp_rank) * micro_batch_size
    return range(start, start + micro_batch_size)


def permuted(index: int, size: int, key: str) -> int:
    """Image of `index` under a permutation of range(size) that `key` selects; constant memory.

    A Feistel network permutes the next power of four, and images outside the range are mapped again until one falls
    inside (cycle walking, Black and Rogaway 2002): under four rounds of it on average.
    """
    assert 0 <= index < size, (index, size)
    half = max(((size - 1).bit_length() + 1) // 2, 1)
    digest = hashlib.blake2b(key.encode(), digest_size=64).digest()
    round_keys = [int.from_bytes(digest[i : i + 8], "little") for i in range(0, 8 * FEISTEL_ROUNDS, 8)]
    while True:
        index = _feistel(index, half, round_keys)
        if index < size:
            return index


def _feistel(value: int, half: int, round_keys: list[int]) -> int:
    mask = (1 << half) - 1
    left, right = value >> half, value & mask
    for key in round_keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(value: int) -> int:
    """The finaliser of splitmix64: every output bit depends on every input bit."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _MASK
    return value ^ value >> 31
