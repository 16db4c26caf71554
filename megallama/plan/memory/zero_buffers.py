"""What DeepSpeed's ZeRO holds on a rank beside state: buckets, gathered weights, temporaries of its step. Pure.

Read off DeepSpeed 0.19 and held against the bytes of a real engine by tests.
"""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import RunConfig
from megallama.plan.memory.activations import Tensors
from megallama.plan.memory.state import MemoryRow

STEP_AT_ONCE = 1_000_000_000
"""Parameters whose gradients ZeRO-3 copies flat for one call of the optimizer: DeepSpeed's sub_group_size."""


@dataclass(frozen=True)
class RankWeights:
    """Elements that ZeRO has to do with on a rank."""

    total: int
    """Before it cuts them."""
    largest: int
    """The elements of the largest weight."""
    ranks: int
    """Those over which it cuts them: dp * cp."""

    @property
    def mine(self) -> int:
        """The elements of this rank's part of the optimizer state."""
        return -(-self.total // self.ranks)


def buffer_row(config: RunConfig, of: Tensors, weights: RankWeights, messages: int) -> MemoryRow:
    """Messages between stages, or what ZeRO-2 and -3 keep at hand from the first forward to the last backward.

    Both have a bucket of gradients (zero/stage_1_and_2.py, setup_buckets; zero/stage3.py). ZeRO-3 gathers weights ahead
    up to `stage3_max_live_parameters`, and copies them out of the order of the ranks in which they come.
    """
    if config.zero.stage < 2:
        size, how = messages * of.state, f"{messages} messages of {of.state}"
    else:
        size, how = _bucket_bytes(config), f"bucket of {config.zero.bucket_elements}"
    if config.zero.stage == 3:
        gathered = min(2 * weights.total, max(2 * config.zero.bucket_elements, weights.largest))
        size, how = size + of.element * gathered, f"{how} + {of.element} B * {gathered} gathered"
    return MemoryRow("buffers", "communication buffers", how, size)


def reduced_bytes(config: RunConfig, weights: RankWeights, micro_batches: int) -> int:
    """The bytes of a backward while it sends a bucket of gradients, or one that is larger; nothing for ZeRO-1.

    ZeRO-2 copies what it sends flat, and casts it to the type that crosses the ranks. In fp32 it has a second set of
    its gradients, made when a first bucket is sent and activations go, until those of the micro-batches before are
    added. ZeRO-3 copies it in the order of the ranks (reduce_scatter_coalesced), and gloo copies that once more.
    """
    at_once = max(min(weights.total, config.zero.bucket_elements), weights.largest)
    if config.zero.stage == 2 and config.train.dtype == "fp32":
        return 4 * max(at_once, weights.mine if micro_batches > 1 else 0)
    if config.zero.stage == 2:
        return (6 if config.zero.communication_dtype == "fp32" else 2) * at_once
    if config.zero.stage == 3:
        return _sent_bytes(config) * at_once * (2 if config.train.device == "cpu" else 1)
    return 0


def own_gradients(config: RunConfig, of: Tensors, weights: RankWeights, activations: int) -> int:
    """How much the gradients of a rank's own part outgrow the activations that go meanwhile; bytes.

    A bucket's gradients lie in the bucket. One that is larger than it lies by itself, and ZeRO-2 lets go of a rank's
    own at the end of the backward (zero/stage_1_and_2.py, copy_grads_in_partition): it counts where all matrices are.
    """
    if config.zero.stage != 2 or config.train.dtype == "fp32" or config.zero.bucket_elements >= of.hidden * of.query:
        return 0
    return max(0, 2 * weights.total - activations) * weights.mine // weights.total


def after_backward(config: RunConfig, weights: RankWeights, reduced: int) -> tuple[str, int]:
    """The fullest moment when activations are gone, and its bytes with the bucket if that is still there.

    It is the optimizer step, but where the bucket takes all gradients, which are then `reduced` at the very end.
    """
    bucket = _bucket_bytes(config)
    step = step_bytes(config, weights) + (bucket if config.zero.stage == 3 else 0)
    last = bucket + reduced
    return ("reduction of all gradients", last) if last > step else ("optimizer step", step)


def start_bytes(config: RunConfig, weights: RankWeights) -> int:
    """The most of a start, without optimizer: DeepSpeed copies weights flat, on a full GPU over the host."""
    element = 2 if config.train.dtype == "bf16" else 4
    if config.zero.stage == 3:
        return element * (2 * weights.mine + weights.largest)
    return element * weights.total * (2 if config.train.device == "cpu" else 1)


def step_bytes(config: RunConfig, weights: RankWeights) -> int:
    """Temporaries of the optimizer step.

    ZeRO-1 casts gradient sums where bf16 crosses the ranks, and has all casts until the last is there; gloo copies what
    it sends, nccl does not. DeepSpeed copies
    a rank's gradients to one flat tensor at ZeRO-2 in fp32 and at ZeRO-3 (zero/stage_1_and_2.py, zero/stage3.py).
    """
    zero, fp32 = config.zero, config.train.dtype == "fp32"
    if zero.stage == 3:
        return 4 * min(weights.mine, STEP_AT_ONCE)
    if zero.stage == 2:
        return 4 * weights.mine if fp32 else 0
    if weights.ranks == 1:
        return 0
    cast = 2 if zero.communication_dtype == "bf16" else 0
    copied = _sent_bytes(config) if config.train.device == "cpu" else 0
    return (cast + copied) * weights.total


def _bucket_bytes(config: RunConfig) -> int:
    """ZeRO-2 has a bucket for gradients in their own type, ZeRO-3 in the type that they cross the ranks in."""
    element = {2: 2 if config.train.dtype == "bf16" else 4, 3: _sent_bytes(config)}.get(config.zero.stage, 0)
    return element * config.zero.bucket_elements


def _sent_bytes(config: RunConfig) -> int:
    """The size of an element of a gradient that crosses the ranks."""
    return 2 if config.zero.communication_dtype == "bf16" else 4
