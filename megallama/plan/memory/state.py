"""Parameters on each rank of a layout, and the bytes of weights, gradients and optimizer state that they are. Pure.

As DeepSpeed 0.19 holds them. Activations, the CUDA context and the allocator's slack come on top.
"""

from __future__ import annotations

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


def state_rows(dtype: str, stage: int, parameters: int, ranks: int, frozen: int = 0) -> list[MemoryRow]:
    """Resident state of a rank that holds `parameters` before ZeRO cuts them over `ranks` (dp below, or dp * cp); those
    `frozen` are weights alone.

    bf16 with fp32 gradient sums: stage 1 is `BF16_Optimizer` (runtime/bf16_optimizer.py), which adds each bf16 gradient
    to a whole fp32 sum as it appears, 6 + 12/dp bytes per parameter; stage 2 keeps its part of the sums alone, 2 +
    16/dp (DeepSpeed's own estimator adds 2/dp for bf16 gradients, which are gone by then); stage 3 cuts the weights as
    well, 18/dp; what it gathers is no state. fp32: DeepSpeed clones an fp32 master even from fp32 weights, 8 + 12/dp
    bytes at stage 1 (zero/stage_1_and_2.py); stages 2 and 3 then follow with gradients, and weights, cut as well.
    """
    assert stage in (1, 2, 3), stage
    weight, cut_gradients = 2 if dtype == "bf16" else 4, ranks if stage >= 2 else 1
    # Every stage adds a bf16 gradient to its fp32 sum as it appears.
    gradients = "fp32 gradients" if dtype == "fp32" else "fp32 gradient sums"
    kinds = (
        (f"{dtype} weights", weight, parameters, ranks if stage == 3 else 1),
        (gradients, 4, parameters - frozen, cut_gradients),
        ("fp32 master weights", 4, parameters - frozen, ranks),
        ("fp32 Adam moments", 8, parameters - frozen, ranks),
    )
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
