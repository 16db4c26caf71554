"""The stages of the model that one rank holds: the whole model, or one or more stretches of a pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from functools import cached_property

from torch import Tensor, nn

from megallama.config.schema import ModelConfig
from megallama.layout.stages import Stage
from megallama.model.llama import Llama, Recompute, TensorParallelContext
from megallama.parallel.shards import ShardSlice


class ModelStages(nn.Module):
    """Of the `stages` of a pipeline those that the pipeline rank `rank` holds."""

    def __init__(
        self,
        config: ModelConfig,
        stages: Sequence[Stage],
        rank: int,
        tp_context: TensorParallelContext,
        *,
        recompute: Recompute = "none",
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        self.config, self.tp_context = config, tp_context
        self.ranks = [stage.rank for stage in stages]
        """Of every stage of the pipeline the rank that holds it."""
        self.stages = nn.ModuleDict(
            {
                str(stage.index): Llama(config, tp_context, recompute=recompute, layers=stage.layers, z_loss=z_loss)
                for stage in stages
                if stage.rank == rank
            }
        )
        self.compiled = False
        """Whether anything is."""
        models = self.models
        first, last = models[0], models[-1]
        # A V-shaped pipeline ends on the rank where it began: one matrix, two chunks.
        if config.tie_word_embeddings and first.embed_tokens is not None and last.lm_head is not None:
            last.lm_head.weight = first.embed_tokens.weight

    @property
    def models(self) -> list[Llama]:
        """The stages in the order of the model."""
        return [model for model in self.stages.values() if isinstance(model, Llama)]

    @property
    def indices(self) -> list[int]:
        """Their places in the pipeline."""
        return [int(index) for index in self.stages]

    def decoder_layers(self) -> Iterator[nn.Module]:
        """All decoder layers of this rank."""
        for model in self.models:
            yield from model.layers.values()

    def compile_parts(self, *, layers: bool) -> None:
        """As of each stage."""
        self.compiled = True
        for model in self.models:
            model.compile_parts(layers=layers)

    def freeze(self, names: Set[str]) -> None:
        """Keep the weights of these names as they are; of what is one matrix here they name all or nothing."""
        for local, pieces in self.shard_slices.items():
            # A rank that has only padding of a vocabulary holds no piece of it, and does as the others do.
            place = local.split(".")[-2]
            if names & {piece.name for piece in pieces} or (not pieces and place in {n.split(".")[-2] for n in names}):
                self.get_parameter(local).requires_grad_(False)

    def forward(self, tokens: Tensor, labels: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        """The whole model, where this rank holds all of it."""
        x = tokens
        for model in self.models:
            x = model(x, labels, documents)
        return x

    @cached_property
    def shard_slices(self) -> dict[str, tuple[ShardSlice, ...]]:
        """What each parameter holds, under the names of Hugging Face's LlamaForCausalLM."""
        found = {
            f"stages.{index}.{name}": pieces
            for index, model in self.stages.items()
            if isinstance(model, Llama)
            for name, pieces in model.shard_slices.items()
        }
        return {name: found[name] for name, _ in self.named_parameters()}
