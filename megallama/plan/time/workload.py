"""One optimizer step as a planner sees it: a shape, a layout and a batch. Pure.

A run becomes one, and so does a published run of another code base: a GPT whose MLP has two matrices, FSDP, a part of
the layers computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megallama.config.schema import RunConfig
from megallama.layout.check import check_batching
from megallama.layout.counts import count_parameters, padded_vocabulary
from megallama.layout.schedules import chunks, schedule_of, stage_ranks
from megallama.layout.stages import layers_per_stage
from megallama.plan.time.simulation import simulated_waiting

SUM_BYTES = {"bf16": 18.0, "fp32": 12.0}
"""Bytes moved to add a gradient to its sum: cast (6) and added in fp32 (12) in bf16, ZeRO 1 (bf16_optimizer.py,
update_hp_grads), and about as many in ZeRO 2 and 3; in fp32 autograd adds in place."""

DataScheme = Literal["all-reduce", "zero1", "zero2", "zero3", "sharded optimizer"]
Overlap = Literal["tensor", "pipeline", "data"]


@dataclass(frozen=True)
class Shape:
    """What multiplies a token."""

    layers: int
    hidden_size: int
    intermediate_size: int
    query_width: int
    """Query heads * their size."""
    kv_width: int
    """Key heads * their size."""
    vocab_size: int
    mlp_matrices: int = 3
    """3 in SwiGLU, 2 in the MLP of a GPT."""
    tied: bool = False
    """The head is the embedding."""
    padding: int = 0
    """Rows that the vocabulary has in memory beyond `vocab_size`; they are computed, and count in no MFU."""

    @property
    def rows(self) -> int:
        """The rows of the vocabulary in memory."""
        return self.vocab_size + self.padding

    @property
    def matmul_per_layer(self) -> int:
        """Weights of one layer that multiply every token."""
        attention = 2 * self.hidden_size * (self.query_width + self.kv_width)
        return attention + self.mlp_matrices * self.hidden_size * self.intermediate_size

    @property
    def head(self) -> int:
        """Weights of the output head, and as many of the embedding."""
        return self.rows * self.hidden_size

    def flops_per_token(self, sequence_length: int, convention: Literal["full", "causal"]) -> int:
        """Forward and backward as MFU counts them; see `megallama.layout.counts`."""
        attention = (12 if convention == "full" else 6) * self.layers * self.query_width * sequence_length
        return 6 * (self.layers * self.matmul_per_layer + self.vocab_size * self.hidden_size) + attention

    def flops_again_per_token(self, sequence_length: int, matmuls: float, attention: float) -> float:
        """What backward computes again of these shares of the layers' forward, in the full convention."""
        square = 4 * self.layers * self.query_width * sequence_length
        return 2 * matmuls * self.layers * self.matmul_per_layer + attention * square


@dataclass(frozen=True)
class Workload:
    """One optimizer step on every rank."""

    shape: Shape
    sequence_length: int
    micro_batch_size: int
    """Sequences."""
    micro_batches: int
    """Per optimizer step, on each data-parallel copy."""
    tp: int = 1
    dp: int = 1
    layers_by_rank: tuple[int, ...] = ()
    """Layers of each pipeline rank, all of its stages together; empty means all on one."""
    head_rank: int = -1
    """The pipeline rank that has the output head."""
    schedule: str = "1f1b"
    chunks: int = 1
    """Stages of each pipeline rank."""
    sequence_parallel: bool = False
    """Activations between tensor-parallel regions are cut along the sequence."""
    matmul_recompute_fraction: float = 0.0
    """Share of the layers' forward matmuls that backward computes again."""
    attention_recompute_fraction: float = 0.0
    """The same of attention."""
    elementwise_recompute_fraction: float = 0.0
    """The same of norms, rotations and activations."""
    activation_recompute_fraction: float = 0.0
    """The same of activations, where norms and rotations are not."""
    layer_recompute_fraction: float = 0.0
    """Share of the layers that run their forward again as a whole, with its tensor-parallel collectives."""
    fused_norm: bool = False
    """A norm is one kernel, its residual sum another."""
    fused: bool = False
    """Norms, rotations and activations are one kernel each: by a compiler or by hand."""
    fused_loss: bool = False
    """The loss is one kernel."""
    data: DataScheme = "zero1"
    gradient_bytes: int = 4
    """The size of one element of a gradient that crosses data-parallel ranks."""
    element_bytes: int = 2
    """The size of one element of a weight or an activation."""
    bucket_elements: int = 100_000_000
    sum_bytes: float = 0.0
    """Read and written for each parameter and micro-batch to add up gradients, beyond what matmuls write."""
    gathers_heads: bool = False
    """tp does not divide the key heads, which are then gathered."""
    waiting: float | None = None
    """The waiting of the busiest rank over its work; None for the closed form of equal stages."""
    overlapped: frozenset[Overlap] = frozenset()
    """Communication that hides behind computation where there is enough of it."""

    @property
    def pp(self) -> int:
        """Pipeline ranks."""
        return max(1, len(self.layers_by_rank))

    @property
    def head(self) -> int:
        """The pipeline rank that has the output head, from 0."""
        return self.head_rank % self.pp

    @property
    def world_size(self) -> int:
        """Ranks."""
        return self.tp * self.pp * self.dp

    @property
    def tokens(self) -> int:
        """Predicted tokens of one optimizer step over all ranks."""
        return self.sequence_length * self.micro_batch_size * self.micro_batches * self.dp

    @property
    def stages(self) -> tuple[int, ...]:
        """Layers of each pipeline rank."""
        return self.layers_by_rank or (self.shape.layers,)


def workload(config: RunConfig, world_size: int, *, simulated: bool = True) -> Workload:
    """The step of a run on `world_size` ranks; UserError if the run is not legal there.

    Waiting is `simulated` from the orders that training runs; without, it is that of equal stages, which takes no time.
    """
    batching = check_batching(config, world_size)
    parallel, model, train = config.parallel, config.model, config.train
    ranks = stage_ranks(parallel)
    layers = [0] * parallel.pipeline
    for rank, count in zip(ranks, layers_per_stage(config), strict=True):
        layers[rank] += count
    # A backward in two parts computes again in each; that of DualPipeV is whole but for a few.
    times = 2.0 if schedule_of(parallel).splits_backward == "always" else 1.0
    again = times if train.recompute == "full" else 0.0
    # Recomputation stops at the input of the down projection.
    down = model.hidden_size * model.intermediate_size / count_parameters(model).matmul_per_layer
    return Workload(
        shape=Shape(
            layers=model.num_hidden_layers,
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            query_width=model.num_attention_heads * model.head_size,
            kv_width=model.kv_heads * model.head_size,
            vocab_size=model.vocab_size,
            tied=model.tie_word_embeddings,
            padding=padded_vocabulary(model.vocab_size, parallel.tensor) - model.vocab_size,
        ),
        sequence_length=config.data.sequence_length,
        micro_batch_size=train.micro_batch_size,
        micro_batches=batching.gradient_accumulation_steps,
        tp=parallel.tensor,
        dp=batching.dp_size,
        layers_by_rank=tuple(layers),
        head_rank=ranks[-1],
        schedule=parallel.schedule,
        chunks=chunks(parallel),
        sequence_parallel=parallel.sequence_parallel,
        matmul_recompute_fraction=again * (1 - down),
        attention_recompute_fraction=again,
        elementwise_recompute_fraction=again,
        activation_recompute_fraction=times if train.recompute == "selective" else 0.0,
        layer_recompute_fraction=again,
        fused_norm=train.device != "cpu",
        fused=train.compile,
        data=_scheme(config.zero.stage),
        gradient_bytes=2 if config.zero.communication_dtype == "bf16" else 4,
        element_bytes=2 if train.dtype == "bf16" else 4,
        bucket_elements=config.zero.bucket_elements,
        sum_bytes=SUM_BYTES[train.dtype],
        gathers_heads=model.kv_heads % parallel.tensor != 0,
        waiting=simulated_waiting(config, batching.gradient_accumulation_steps) if simulated else None,
    )


def _scheme(stage: int) -> DataScheme:
    schemes: tuple[DataScheme, ...] = ("all-reduce", "zero1", "zero2", "zero3")
    return schemes[stage]
