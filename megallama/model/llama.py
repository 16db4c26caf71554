"""Llama, all generations (arXiv 2302.13971, 2307.09288, 2407.21783), written as for one device.

Hidden states are [sequence, batch, hidden], tokens [batch, sequence] and logits [batch, sequence, vocabulary].
Parallelism enters through the layers of `model.layers` alone; a stage of a pipeline is the same module with fewer
layers and without embedding or head.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megallama.config.schema import ModelConfig, RunConfig
from megallama.layout.counts import FORWARD_AGAIN
from megallama.layout.topology import AxisName
from megallama.model.attention import (
    AttentionCore,
    FusedAttention,
    attention_of,
    causal_attention,
    heads_first,
    positions,
    sequence_first,
)
from megallama.model.layers import (
    SEQUENCE,
    ColumnParallelLinear,
    GradientFilter,
    Matmuls,
    RMSNorm,
    RowParallelLinear,
    VocabParallel,
    VocabParallelEmbedding,
)
from megallama.model.offload import OffloadedInputs
from megallama.model.rotary import compiled_rotate, rotary_frequencies, rotate, rotation
from megallama.model.tiled_mlp import tile, tiled_mlp
from megallama.parallel.collectives import all_gather, copy_to, gather
from megallama.parallel.cross_entropy import IN_PLACE, compiled_kernels, linear_cross_entropy
from megallama.parallel.mesh import ALONE, Axis
from megallama.parallel.shards import ShardSlice, shard_slices

Recompute = Literal["none", "selective", "full", "offload"]


@dataclass(frozen=True)
class TensorParallelContext:
    """Where parallelism enters the model: the tensor-parallel axis, whether the sequence is cut between layers, the
    attention over positions."""

    tp: Axis = ALONE
    sequence_parallel: bool = False
    part: GradientFilter = field(default_factory=GradientFilter)
    attention: FusedAttention = causal_attention

    @classmethod
    def of(cls, config: RunConfig, axes: Mapping[AxisName, Axis]) -> Self:
        """That of a run, on a rank with these axes."""
        return cls(axes["tp"], config.parallel.sequence_parallel, attention=attention_of(config, axes))


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245), of normalised queries and keys if the model says so."""

    def __init__(self, config: ModelConfig, tp_context: TensorParallelContext) -> None:
        super().__init__()
        tp = tp_context.tp
        self.tp, self.head_dim, self.core = tp, config.head_size, tp_context.attention
        self.heads, self.kv_heads = config.num_attention_heads, config.kv_heads
        kv_width = self.kv_heads * self.head_dim
        widths = {"q_proj": self.heads * self.head_dim, "k_proj": kv_width, "v_proj": kv_width}
        sequence = tp_context.sequence_parallel
        self.qkv_proj = ColumnParallelLinear(config.hidden_size, widths, tp, sequence, tp_context.part)
        out = widths["q_proj"], config.hidden_size
        self.o_proj = RowParallelLinear("o_proj", *out, tp, sequence, tp_context.part)
        self.rotate: Callable[[Tensor, Tensor, Tensor], Tensor] = rotate
        self.q_norm = _head_norm("q_norm", config, tp)
        self.k_norm = _head_norm("k_norm", config, tp)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, core: AttentionCore | None = None) -> Tensor:
        """With a `core` of its own for this call: one that knows documents, or keys and values from before."""
        q, k, v = self.qkv_proj(x).split(self.qkv_proj.widths, dim=-1)
        q, k, v = self.q_norm(self._split_heads(q)), self.k_norm(self._own_kv_heads(k)), self._own_kv_heads(v)
        # Values in memory of their own: a view of the projection would keep all of it for backward.
        q, k, v = (heads_first(each) for each in (q, k, v.contiguous()))
        q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
        return self.o_proj(sequence_first((core or self.core)(q, k, v)).flatten(2))

    def _split_heads(self, x: Tensor) -> Tensor:
        """[sequence, batch, heads * head_dim] -> [sequence, batch, heads, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim))

    def _own_kv_heads(self, x: Tensor) -> Tensor:
        """The key or value heads that this rank's query heads read: [sequence, batch, heads, head_dim].

        Where tp does not divide the heads, this rank projects a slice that may end inside a head: the slices are
        gathered, and one head is picked per query head, as Megatron-LM does.
        """
        if self.kv_heads % self.tp.size == 0:
            return self._split_heads(x)
        every = self._split_heads(gather(x, x.dim() - 1, self.tp))
        local = self.heads // self.tp.size
        queries = torch.arange(self.tp.rank * local, (self.tp.rank + 1) * local, device=x.device)
        return every[:, :, queries // (self.heads // self.kv_heads)]


def swiglu(x: Tensor) -> Tensor:
    """Gate and up [..., 2 * width] -> silu(gate) * up [..., width]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@cache
def compiled_swiglu() -> Callable[[Tensor], Tensor]:
    """One kernel forward and one backward."""
    return torch.compile(swiglu)


def compile_keeping_little(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """torch's compiler, with normalised inputs and SwiGLU's product formed again in backward, as elementwise passes.

    By itself it keeps whatever a matmul of the backward reads. In bf16, with an MLP 8/3 as wide as the hidden states, a
    layer so keeps 23 bytes of each position and channel instead of 32.
    """
    # Imported here: it brings the compiler with it, seconds that only those wait for who need it.
    import torch._functorch.config
    from torch._inductor.compile_fx import compile_fx

    keep_less = {"ban_recompute_used_far_apart": False, "ban_recompute_materialized_backward": False}
    with torch._functorch.config.patch(keep_less):
        return compile_fx(graph, inputs)


class DownProjection(RowParallelLinear):
    """SwiGLU (arXiv 2002.05202), then down: [sequence, batch, 2 * intermediate / tp] -> [sequence, batch, hidden].

    Selective recomputation keeps gate and up only and forms silu(gate) and the product again in backward: half the
    bytes of the block for an elementwise pass (the matmul is not repeated, since recomputation stops at its inputs).
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.recompute = False
        self.activation: Callable[[Tensor], Tensor] = swiglu

    def matmul(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            result: Tensor = checkpoint(self._swiglu_matmul, x, use_reentrant=False, preserve_rng_state=False)
            return result
        return self._swiglu_matmul(x)

    def _swiglu_matmul(self, x: Tensor) -> Tensor:
        return super().matmul(self.activation(x))


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), in tiles of the tokens where backward computes it again and they are many."""

    in_tiles = False

    def __init__(self, config: ModelConfig, tp_context: TensorParallelContext) -> None:
        super().__init__()
        width, hidden = config.intermediate_size, config.hidden_size
        outputs = {"gate_proj": width, "up_proj": width}
        tp, sequence = tp_context.tp, tp_context.sequence_parallel
        self.gate_up_proj = ColumnParallelLinear(hidden, outputs, tp, sequence, tp_context.part)
        self.down_proj = DownProjection("down_proj", width, hidden, tp, sequence, tp_context.part)

    def forward(self, x: Tensor) -> Tensor:
        gates, down = self.gate_up_proj, self.down_proj
        axis = gates.tp if gates.sequence_parallel else ALONE
        if not self.in_tiles or x.shape[:-1].numel() * axis.size <= tile(sum(gates.widths)):
            return down(gates(x))
        x = x if gates.sequence_parallel else copy_to(x, gates.tp)
        # A compiler would plan the memory of all tiles together.
        run = torch.compiler.disable(tiled_mlp)
        return down.reduce(run(x, gates.weight, down.weight, axis, gates.part))


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, tp_context: TensorParallelContext, recompute: Recompute) -> None:
        super().__init__()
        self.recompute = recompute in FORWARD_AGAIN
        self.input_layernorm = _norm("input_layernorm", config, tp_context)
        self.self_attn = Attention(config, tp_context)
        self.post_attention_layernorm = _norm("post_attention_layernorm", config, tp_context)
        self.mlp = MLP(config, tp_context)
        self.mlp.down_proj.recompute = recompute == "selective"
        self.mlp.in_tiles = self.recompute

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, core: AttentionCore | None = None) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            result: Tensor = checkpoint(self._layer, x, cos, sin, core, use_reentrant=False, preserve_rng_state=False)
            return result
        return self._layer(x, cos, sin, core)

    def compile_parts(self, *, whole: bool) -> None:
        """Compile the layer when it first runs, or its rotations and activation alone."""
        if whole:
            self.compile(backend=compile_keeping_little if self.mlp.down_proj.recompute else "inductor")
        else:
            self.self_attn.rotate = compiled_rotate()
            self.mlp.down_proj.activation = compiled_swiglu()

    def _layer(self, x: Tensor, cos: Tensor, sin: Tensor, core: AttentionCore | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, core)
        return x + self.mlp(self.post_attention_layernorm(x))


class Head(VocabParallel):
    """The output head: the summed loss of given labels, or logits."""

    def __init__(self, config: ModelConfig, tp_context: TensorParallelContext, z_loss: float) -> None:
        super().__init__("lm_head", config.vocab_size, config.hidden_size, tp_context.tp)
        self.sequence_parallel, self.z_loss = tp_context.sequence_parallel, z_loss
        self.kernels = IN_PLACE

    def forward(self, hidden: Tensor, labels: Tensor | None) -> Tensor:
        """With labels [batch, sequence] the sum of their losses; without, logits [batch, sequence, vocabulary]."""
        hidden = gather(hidden, SEQUENCE, self.tp) if self.sequence_parallel else copy_to(hidden, self.tp)
        if labels is None:
            logits = F.linear(hidden.transpose(0, 1), self.weight)
            return all_gather(logits, logits.dim() - 1, self.tp)[..., : self.vocab_size]
        of_rank = self.first, self.real_rows, self.tp
        return linear_cross_entropy(
            hidden.flatten(0, 1), self.weight, labels.t().flatten(), *of_rank, self.z_loss, self.kernels
        )


class Llama(nn.Module):
    """A run of consecutive decoder layers, with the embedding before the first and the head after the last.

    forward(tokens [batch, sequence], labels) -> summed loss; without labels -> logits. A stage that does not begin
    with the embedding takes hidden states instead of tokens; one that does not end with the head returns them:
    [sequence (/ tp with sequence parallelism), batch, hidden]. With `documents` [batch, sequence], attention and
    positions stay within the documents that they tell apart, at any stage. The gradient of the loss has the term of
    `z_loss` as well, as of `linear_cross_entropy`.
    """

    def __init__(
        self,
        config: ModelConfig,
        tp_context: TensorParallelContext | None = None,
        *,
        recompute: Recompute = "none",
        layers: Sequence[int] | None = None,
        z_loss: float = 0.0,
    ) -> None:
        super().__init__()
        tp_context = tp_context or TensorParallelContext()
        layers = range(config.num_hidden_layers) if layers is None else layers
        self.config, self.tp_context, self.offload = config, tp_context, recompute == "offload"
        self.embed_tokens = _embedding(config, tp_context) if layers[0] == 0 else None
        self.layers = nn.ModuleDict({str(index): DecoderLayer(config, tp_context, recompute) for index in layers})
        last = layers[-1] == config.num_hidden_layers - 1
        self.norm = _norm("norm", config, tp_context) if last else None
        self.lm_head = Head(config, tp_context, z_loss) if last else None
        if config.tie_word_embeddings and self.lm_head is not None and self.embed_tokens is not None:
            self.lm_head.weight = self.embed_tokens.weight
        self.frequencies = rotary_frequencies(config)
        self.copies: torch.cuda.Stream | None = None

    def multiply_by(self, matmuls: Matmuls) -> None:
        """Let the linear layers of the decoder compute their matrix products so; the head stays as it is."""
        for module in self.layers.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module.matmuls = matmuls

    def compile_parts(self, *, layers: bool) -> None:
        """Compile, when they first run, the loss and each decoder layer, whole or else its rotations and activation.

        All layers are one program. Rotations and activation have no weights: ZeRO 3 may bring these and take them, and
        a schedule may split the backward between inputs and weights.
        """
        for layer in self.layers.values():
            assert isinstance(layer, DecoderLayer)
            layer.compile_parts(whole=layers)
        if self.lm_head is not None:
            self.lm_head.kernels = compiled_kernels()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves the frequencies as well. They are no buffer: a cast to bf16 must not round the angles."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.frequencies = self.frequencies.to(fn(self.frequencies).device)
        return self

    def _copies(self, device: torch.device) -> torch.cuda.Stream | None:
        """The stream of this stage's copies to the host and back; None on a CPU."""
        if self.copies is None and device.type == "cuda":
            self.copies = torch.cuda.Stream(device)
        return self.copies

    def forward(self, x: Tensor, labels: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
        attention, core = self.tp_context.attention, None
        if self.embed_tokens is not None:
            length = x.shape[1]
        else:
            length = x.shape[SEQUENCE] * (self.tp_context.tp.size if self.tp_context.sequence_parallel else 1)
        places = attention.places(length, x.device)
        if documents is not None:
            core = attention.within(documents, self.config.head_size)
            places = positions(documents)[:, places]
        cos, sin = rotation(places, self.frequencies)
        if self.embed_tokens is not None:
            x = self.embed_tokens(x)
        inputs = OffloadedInputs(x.device, self._copies(x.device)) if self.offload else None
        for layer in self.layers.values():
            with nullcontext() if inputs is None else inputs.of(x):
                x = layer(x, cos, sin, core)
        if self.norm is None or self.lm_head is None:
            return x
        return self.lm_head(self.norm(x), labels)

    @cached_property
    def shard_slices(self) -> dict[str, tuple[ShardSlice, ...]]:
        """What each parameter holds, under the names of Hugging Face's LlamaForCausalLM."""
        return {
            name: tuple(p if p.name.startswith("lm_head") else replace(p, name=f"model.{p.name}") for p in pieces)
            for name, pieces in shard_slices(self).items()
        }


def _norm(name: str, config: ModelConfig, tp_context: TensorParallelContext) -> RMSNorm:
    return RMSNorm(name, config.hidden_size, config.rms_norm_eps, share=tp_context.sequence_parallel)


def _head_norm(name: str, config: ModelConfig, tp: Axis) -> nn.Module:
    """Over the channels of each head, of which tensor-parallel ranks have their own."""
    return RMSNorm(name, config.head_size, config.rms_norm_eps, tp.size > 1) if config.qk_norm else nn.Identity()


def _embedding(config: ModelConfig, tp_context: TensorParallelContext) -> VocabParallelEmbedding:
    return VocabParallelEmbedding(
        "embed_tokens", config.vocab_size, config.hidden_size, tp_context.tp, tp_context.sequence_parallel
    )
