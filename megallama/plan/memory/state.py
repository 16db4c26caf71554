"""Parameters on each rank of a layout, and the bytes of weights, gradients and optimizer state that they are. Pure.

As DeepSpeed 0.19 holds them. Activations, the CUDA context and the allocator's slack come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megallama.config.schema import RunConfig
from megallama.layout.counts import count_parameters, padded_vocabulary
from megallama.layout.frozen import frozen_elements
from megallama.layout.stages import stages

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryRow:
    """One kind of memory on a rank; `how` is its arithmetic."""

    key: str
    name: str
    how: str
    size: int
    """Bytes."""


def state_rows(
    dtype: str,
    stage: int,
    parameters: int,
    ranks: int,
    frozen: int = 0,
    *,
    averaged: bool = False,
    offloaded: bool = False,
) -> list[MemoryRow]:
    """Resident state of a rank that holds `parameters` before ZeRO cuts them over `ranks` (dp below, or dp * cp); those
    `frozen` are weights alone. If they are `averaged`, an exponential average lies beside the masters. What is
    `offloaded` is in `offloaded_rows`.

    bf16 with fp32 gradient sums: at stage 1 each bf16 gradient is added to a whole fp32 sum as it appears, 6 + 12/dp
    bytes per parameter; stage 2 keeps its part of the sums alone, 2 + 16/dp (DeepSpeed's own estimator adds 2/dp for
    bf16 gradients, which are gone by then); stage 3 cuts the weights as well, 18/dp; what it gathers is no state. fp32:
    at stage 1 a rank's part of the weights is its master, 8 + 8/dp (train/zero.py); at stages 2 and 3 DeepSpeed clones
    an fp32 master even from fp32 weights (zero/stage_1_and_2.py), 4 + 16/dp and 20/dp.
    """
    assert stage in (1, 2, 3), stage
    weight, cut_gradients = 2 if dtype == "bf16" else 4, ranks if stage >= 2 else 1
    # Every stage adds a bf16 gradient to its fp32 sum as it appears.
    gradients = "fp32 gradients" if dtype == "fp32" else "fp32 gradient sums"
    kinds = (
        (f"{dtype} weights", weight, parameters, ranks if stage == 3 else 1),
        (gradients, 4, parameters - frozen, cut_gradients),
        *([("fp32 master weights", 4, parameters - frozen, ranks)] if dtype == "bf16" or stage > 1 else []),
        ("fp32 Adam moments", 8, parameters - frozen, ranks),
        *([("fp32 average", 4, parameters - frozen, ranks)] if averaged else []),
    )
    return _rows(kinds[:2] if offloaded else kinds)


def offloaded_rows(trained: int, ranks: int, *, averaged: bool = False) -> list[MemoryRow]:
    """State in host memory with `zero.offload_optimizer: cpu`, of a rank that trains so many: also the gradients of an
    update, which are copied there.
    """
    kinds = [("fp32 master weights", 4), ("fp32 Adam moments", 8), ("fp32 gradients of the update", 4)]
    kinds += [("fp32 average", 4)] if averaged else []
    return _rows([(name, size, trained, ranks) for name, size in kinds])


def _rows(kinds: Sequence[tuple[str, int, int, int]]) -> list[MemoryRow]:
    """Of each the name, the bytes of an element, the elements, and over how many ranks they are cut."""
    return [
        MemoryRow(name.replace(" ", "_"), name, f"{size} B * {count} / {cut}", -(-count * size // cut))
        for name, size, count, cut in kinds
    ]


@dataclass(frozen=True)
class RankParameters:
    """What a rank at one place of the pipeline holds, by how tensor parallelism treats it."""

    rank: int
    """On the pipeline axis."""
    stages: tuple[int, ...]
    layers: int
    sharded: int
    """Weights cut over the tensor-parallel ranks, unpadded; rounded up where the vocabulary does not divide."""
    replicated: int
    """Norms, whole on every tensor-parallel rank."""
    padding: int
    """Rows that exist only to round the vocabulary up."""
    frozen: int = 0
    """Of the weights, without padding."""

    @property
    def total(self) -> int:
        """Parameters in this rank's memory before ZeRO."""
        return self.sharded + self.replicated + self.padding


def rank_parameters(config: RunConfig) -> list[RankParameters]:
    """Parameters on the ranks of the pipeline, in order.

    The first stage has the embedding, the last the final norm and the head; a tied matrix is held once.
    """
    model, tp = config.model, config.parallel.tensor
    count = count_parameters(model)
    padded = padded_vocabulary(model.vocab_size, tp) * model.hidden_size // tp
    table = -(-model.vocab_size // tp) * model.hidden_size
    every = stages(config)
    found = []
    for rank in range(config.parallel.pipeline):
        mine = [stage for stage in every if stage.rank == rank]
        layers = sum(len(stage.layers) for stage in mine)
        first, last = every[0] in mine, every[-1] in mine
        tables = 1 if first and last and model.tie_word_embeddings else int(first) + int(last)
        found.append(
            RankParameters(
                rank=rank,
                stages=tuple(stage.index for stage in mine),
                layers=layers,
                sharded=layers * count.matmul_per_layer // tp + tables * table,
                replicated=layers * count.norms_per_layer + (count.final_norm if last else 0),
                padding=tables * (padded - table),
                frozen=frozen_elements(config, [stage.layers for stage in mine], first, last),
            )
        )
    return found
