"""Bytes of weights, gradients and optimizer state on one rank, as DeepSpeed 0.19 holds them. Pure.

Activations, the CUDA context and the allocator's slack come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import ModelConfig, RunConfig
from megallama.plan.params import count_parameters, padded_vocabulary
from megallama.plan.ranks import rank_parameters

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryRow:
    """One kind of memory on a rank; `how` is its arithmetic."""

    key: str
    name: str
    how: str
    size: int
    """Bytes."""


@dataclass(frozen=True)
class StateRow:
    """One kind of state: bytes per parameter, and over how many data-parallel ranks it is cut."""

    name: str
    parameters: int
    bytes_per_parameter: int
    ranks: int

    @property
    def size(self) -> int:
        """Bytes on one rank, rounded up."""
        return -(-self.parameters * self.bytes_per_parameter // self.ranks)


def state_rows(dtype: str, stage: int, parameters: int, dp_size: int, largest_layer: int = 0) -> list[StateRow]:
    """Resident state of a rank that holds `parameters` before ZeRO cuts them.

    bf16 with fp32 gradient sums: stage 1 is `BF16_Optimizer` (runtime/bf16_optimizer.py), which adds each bf16 gradient
    to a whole fp32 sum as it appears, 6 + 12/dp bytes per parameter; stage 2 keeps its part of the sums alone, 2 +
    16/dp (DeepSpeed's own estimator adds 2/dp for bf16 gradients, which are gone by then); stage 3 cuts the weights as
    well, 18/dp + 4 * largest layer. fp32: DeepSpeed clones an fp32 master even from fp32 weights, 8 + 12/dp bytes at
    stage 1 (zero/stage_1_and_2.py); stages 2 and 3 then follow with gradients, and weights, cut as well.
    """
    assert stage in (1, 2, 3), stage
    weight = 2 if dtype == "bf16" else 4
    cut_gradients = dp_size if stage >= 2 else 1
    rows = [StateRow(f"{dtype} weights", parameters, weight, dp_size if stage == 3 else 1)]
    # Every stage adds a bf16 gradient to its fp32 sum as it appears.
    if dtype == "fp32":
        rows.append(StateRow(f"{dtype} gradients", parameters, weight, cut_gradients))
    if dtype == "bf16":
        rows.append(StateRow("fp32 gradient sums", parameters, 4, cut_gradients))
    rows += [
        StateRow("fp32 master weights", parameters, 4, dp_size),
        StateRow("fp32 Adam moments", parameters, 8, dp_size),
    ]
    if stage == 3:
        rows.append(StateRow("largest layer, gathered", largest_layer, 4, 1))
    return rows


def state_bytes(dtype: str, stage: int, parameters: int, dp_size: int, largest_layer: int = 0) -> int:
    """Sum of `state_rows`."""
    return sum(row.size for row in state_rows(dtype, stage, parameters, dp_size, largest_layer))


def largest_layer(model: ModelConfig, tp_size: int) -> int:
    """Parameters of the largest piece that ZeRO-3 gathers at once: one decoder layer, or the embedding."""
    count = count_parameters(model)
    layer = count.matmul_per_layer // tp_size + count.norms_per_layer
    return max(layer, padded_vocabulary(model.vocab_size, tp_size) * model.hidden_size // tp_size)


def rank_state(config: RunConfig, dp_size: int) -> list[list[StateRow]]:
    """State of a rank at each place of the pipeline."""
    model, tp = config.model, config.parallel.tensor
    return [
        state_rows(config.train.dtype, config.zero.stage, rank.total, dp_size, largest_layer(model, tp))
        for rank in rank_parameters(config)
    ]
