"""Parameters on each rank of a layout. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from megallama.config.schema import RunConfig
from megallama.layout.counts import count_parameters, padded_vocabulary
from megallama.layout.stages import stages


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
            )
        )
    return found
