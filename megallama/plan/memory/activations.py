"""Bytes that a forward keeps for its backward, counted tensor by tensor from what the model's operations save. Pure.

A position is one token of one sequence; `t` is the tensor-parallel size, and `cut` is `t` where sequence parallelism
cuts what lies between the tensor-parallel regions (arXiv 2205.05198), else 1. Tensors that share memory count once, and
a view counts as all of what it is a view of.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from megallama.config.schema import RunConfig
from megallama.layout.compiled import attends_in_blocks, compiles, compiles_layers
from megallama.layout.counts import FORWARD_AGAIN, GATES_AT_ONCE, logits_at_once, padded_vocabulary
from megallama.layout.stages import Stage


@dataclass(frozen=True)
class Tensors:
    """Sizes on one rank from which all else follows: elements, and bytes of each."""

    element: int
    """Bytes of an activation: 2 or 4."""
    positions: int
    """The positions of one micro-batch on this rank, before sequence parallelism."""
    sequence: int
    """The positions of one sequence, on all ranks that share it."""
    context: int
    """Ranks that share a sequence."""
    exchanges: bool
    """They have some heads of the whole of it in attention, and not all keys and values (`ulysses`)."""
    outputs: int
    """Copies of attention's output: o_proj reads another where it is put together of slices or documents, or sent."""
    between: int
    """Positions between tensor-parallel regions."""
    hidden: int
    query: int
    """Width of the query heads on this rank."""
    qkv: int
    """Width of the fused projection on this rank."""
    key: int
    """Width of the keys that attention reads on this rank; its values are as wide."""
    gathers_heads: bool
    """tp does not divide the key and value heads: they are gathered, and one picked for each query head."""
    heads: int
    width: int
    """The width of the SwiGLU product on this rank."""
    up: int
    """The width of gate and up projection together; of a GPT's MLP, which has no gate, that of the product."""
    rows: int
    """The rows of the vocabulary on this rank, with its padding."""
    qk_norm: bool
    """Queries and keys are normalised head by head."""
    sums: int
    """Bytes of the softmax sums that attention keeps for each position."""
    rotation: int
    """Bytes of each element that is rotated, on the way: if not compiled, it turned, and three products in fp32."""
    fp8: int
    """Bytes of each element of a factor while it is cast for a matmul in fp8; 0 without."""
    compiled: bool
    """Each layer is one program."""
    fused_norm: bool
    """A GPU's norm keeps its input and one number per position; a CPU's keeps what it computes in fp32 on the way."""

    @property
    def norm_keeps_input(self) -> bool:
        """Whether the tensor that a norm reads is itself kept, and not a copy in fp32."""
        return self.fused_norm or self.element == 4

    @property
    def keys(self) -> int:
        """Elements of the keys that attention reads on this rank; as many of the values."""
        return self.positions * self.key * (1 if self.exchanges else self.context)

    @property
    def state(self) -> int:
        """Bytes of the hidden state between tensor-parallel regions."""
        return self.element * self.between * self.hidden

    @property
    def whole_state(self) -> int:
        """Bytes of the hidden state of all positions."""
        return self.element * self.positions * self.hidden


def tensors(config: RunConfig) -> Tensors:
    """The sizes of a run's tensors on each rank; the CPU's norm only where the run asks for a CPU."""
    model, parallel = config.model, config.parallel
    tp, size = parallel.tensor, model.head_size
    positions = config.train.micro_batch_size * config.data.sequence_length // parallel.context
    gathers, exchanges = model.kv_heads % tp != 0, parallel.context_mode == "ulysses"
    apart = config.data.documents_apart
    on_gpu = config.train.device != "cpu"
    copied = apart and not on_gpu  # a GPU has one kernel for all documents and slices
    # Then a kernel's backward needs neither its output nor its sums.
    in_blocks = attends_in_blocks(config, on_gpu)
    if parallel.context > 1:
        copied |= exchanges or (config.train.objective == "causal" and not apart)
    heads = model.num_attention_heads // tp
    query, key_values = heads * size, model.kv_heads * size // tp
    return Tensors(
        element=2 if config.train.dtype == "bf16" else 4,
        positions=positions,
        sequence=config.data.sequence_length,
        context=parallel.context,
        exchanges=exchanges,
        outputs=2 if copied and not in_blocks else 1,
        between=positions // tp if parallel.sequence_parallel else positions,
        hidden=model.hidden_size,
        query=query,
        qkv=query + 2 * key_values,
        key=query if gathers else key_values,
        gathers_heads=gathers,
        heads=heads,
        width=model.intermediate_size // tp,
        up=(model.mlp_matrices - 1) * model.intermediate_size // tp,
        rows=padded_vocabulary(model.vocab_size, tp) // tp,
        qk_norm=model.qk_norm,
        sums=0 if in_blocks else 4 * heads,
        rotation=0 if compiles(config, on_gpu) else 14 if config.train.dtype == "bf16" else 16,
        fp8=0 if config.train.matmul == "dtype" else 2 if compiles_layers(config, on_gpu) else 9,
        compiled=compiles_layers(config, on_gpu),
        fused_norm=on_gpu,
    )


def largest_weight(of: Tensors) -> int:
    """Elements of a rank's largest parameter: the embedding, or the gates and the up projection of an MLP."""
    return of.hidden * max(of.rows, of.up, of.qkv)


def norm_bytes(of: Tensors) -> int:
    """An RMSNorm: fused, its input and the inverse root in fp32; else input and normalised input, both in fp32."""
    kept = of.element * of.hidden if of.fused_norm else 2 * 4 * of.hidden
    return of.between * (kept + 4)


def layer_bytes(of: Tensors, recompute: str) -> int:
    """A decoder layer.

    Attention: the input of qkv; rotated queries and keys, and the values, in memory of their own; attention's output,
    which is o_proj's input; the logarithm of each softmax sum. MLP: the input of gate_up and its output; silu(gate) and
    the product, unless selective recomputation forms them again, which in a compiled layer does so with the two
    normalised inputs (compile_keeping_little). Full recomputation keeps the layer's input alone, and offload on a GPU
    moves it to the host.
    """
    if recompute in FORWARD_AGAIN:
        return of.state if recompute == "full" or not of.fused_norm else 0
    mlp = of.element * of.up * (1 if recompute == "selective" else 2)
    norms = 2 * norm_bytes(of) + 2 * of.state
    if of.compiled and recompute == "selective":
        norms = 2 * of.state + 2 * 4 * of.between
    return norms + attention_bytes(of) + of.positions * mlp


def attention_bytes(of: Tensors) -> int:
    """What attention keeps between its projections.

    Context-parallel ranks keep the keys and values that came from all of them, in the order of the sequence, and none
    of their own.
    """
    read = of.positions * (of.element * (1 + of.outputs) * of.query + of.sums) + head_norm_bytes(of)
    read += 2 * 8 * of.heads if of.gathers_heads else 0  # the numbers of the heads that are picked
    return read + 2 * of.element * of.keys


def head_norm_bytes(of: Tensors) -> int:
    """The norms of queries and keys, as in `norm_bytes`: what they read, if it is kept by nothing else, and the rest.

    Queries, and keys unless these were picked from gathered heads, are views of the projection's whole output.
    """
    if not of.qk_norm:
        return 0
    width = of.query + of.key
    each = 4 * of.heads * width // of.query
    if not of.norm_keeps_input:
        return of.positions * (2 * 4 * width + each)
    picked = of.key if of.gathers_heads else 0
    return of.positions * (of.element * (picked + of.qkv) + (0 if of.fused_norm else 4 * width) + each)


def in_tiles(of: Tensors, recompute: str) -> bool:
    """Whether gate and up of all tokens are never in memory together."""
    return recompute in FORWARD_AGAIN and of.positions * of.up > GATES_AT_ONCE


def waiting_layer_bytes(of: Tensors, recompute: str) -> int:
    """Between the two parts of a split backward: the gradients of every linear layer's and norm's output.

    torch keeps these for the weights' part (torch.distributed.pipelining, stage_backward_input).
    """
    gates = 0 if in_tiles(of, recompute) else of.up
    normed = of.query + of.key if of.qk_norm else 0
    outputs = of.element * of.positions * (of.qkv + normed + gates) + 2 * of.whole_state
    return outputs + 2 * of.state


@dataclass(frozen=True)
class StageBytes:
    """What a stage keeps of one micro-batch from its forward to its backward."""

    layers: int
    rotations: int
    """cos and sin of every position, of a sequence or of all, fp32, made in each forward."""
    embedding: int
    norm: int
    """The last norm."""
    loss: int
    """The gradients of the head's input and weight, which the loss forms in forward: its logits are gone by then."""
    sent: int
    """The hidden state that left for the next stage; the pipeline keeps it to begin the backward from."""
    received: int
    """The hidden state that came, where the first operation keeps a copy in fp32 in its place."""
    waiting: int
    """More, between the two parts of a split backward."""

    @property
    def saved(self) -> int:
        """What autograd keeps."""
        return self.layers + self.rotations + self.embedding + self.norm + self.loss

    @cached_property  # a search asks a million times
    def total(self) -> int:
        """Until the backward begins."""
        return self.saved + self.sent + self.received


def stage_bytes(config: RunConfig, of: Tensors, stage: Stage, count: int) -> StageBytes:
    """What stage `stage` of `count` keeps of a micro-batch whose tensors have these sizes."""
    recompute = config.train.recompute
    first, last = stage.index == 0, stage.index == count - 1
    table = of.rows * of.hidden
    copied = not of.norm_keeps_input and recompute not in FORWARD_AGAIN
    # Positions in documents differ from sequence to sequence.
    rotated = of.positions if config.data.documents_apart else of.sequence // of.context
    return StageBytes(
        layers=len(stage.layers) * layer_bytes(of, recompute),
        rotations=2 * 4 * rotated * config.model.head_size,
        embedding=of.positions * (8 if config.parallel.tensor == 1 else 9) if first else 0,
        norm=norm_bytes(of) if last else 0,
        loss=of.whole_state + 4 * table if last else 0,
        sent=0 if last else of.state,
        # It also keeps the first layer's input, whoever else does.
        received=of.state if (copied or not layer_bytes(of, recompute)) and not first else 0,
        # The first stage has no input to compute a gradient for: all its backward is in the weights' part.
        waiting=0 if first else len(stage.layers) * waiting_layer_bytes(of, recompute),
    )


def logits_chunk(of: Tensors) -> int:
    """Positions whose logits are held at once."""
    return min(of.positions, max(1, logits_at_once(4) // of.rows))


def logits_bytes(of: Tensors) -> int:
    """Logits held at once: fp32, and the gradient that they become in bf16. Compiled, the loss holds a little less."""
    return logits_chunk(of) * of.rows * (6 if of.element == 2 else 4)


def loss_forward_bytes(of: Tensors) -> int:
    """The most beside what it keeps: logits, or one chunk of them and its part of the weight's gradient; its input."""
    gathered = of.state if of.between < of.positions else 0
    return logits_bytes(of) + of.element * of.rows * of.hidden + of.whole_state + gathered


def loss_backward_bytes(of: Tensors) -> int:
    """The gradients that it scales: of its input, and of its weight in fp32 and in the weight's type."""
    return of.whole_state + of.rows * of.hidden * (6 if of.element == 2 else 4)


def recomputed_bytes(of: Tensors, recompute: str) -> int:
    """What the backward of a layer computes again before it begins; of offload also its input and the next one."""
    if recompute in FORWARD_AGAIN:
        moved = 0 if layer_bytes(of, recompute) else 2 * of.state
        gates = 2 * of.element * of.positions * of.up if in_tiles(of, recompute) else 0
        return layer_bytes(of, "none") + moved - gates - (of.state if of.norm_keeps_input else 0)
    return of.element * of.positions * of.up if recompute == "selective" else 0


def layer_backward_bytes(of: Tensors, recompute: str) -> int:
    """The most that the backward of a layer holds beside what its forward kept.

    The gradient of the layer's output, what is computed again, and the fullest of: the gradients of the product and of
    the down projection's weight; those of the product and its two factors, when the product is gone; that of the gate
    and up projection's weight beside the gathered input and the sum of its gradient under way, when all of the MLP is
    gone but its gradient; of gathered keys and values four tensors
    that are as large as either, while slices' gradients are added, ordered and scattered.
    """
    gathered = of.whole_state if of.between < of.positions else 0
    product, weight = of.element * of.positions * of.width, of.element * of.hidden * of.width
    gates, gate_weights = of.element * of.positions * of.up, of.element * of.hidden * of.up
    moments = [gathered + product + weight, gates, 2 * gathered + of.state + gate_weights - gates]
    if in_tiles(of, recompute):
        moments, gates = [2 * gathered + of.whole_state + _tiles_bytes(of)], 0
    if of.context > 1 and not of.exchanges:
        kept = 2 * gates + norm_bytes(of) + of.state
        moments.append(4 * of.element * of.keys + 2 * of.element * of.positions * of.query - kept)
    whole = recomputed_bytes(of, recompute) + max(moments) + fp8_bytes(of)
    return max(of.state + whole, rotating_bytes(of, recompute))


def rotating_bytes(of: Tensors, recompute: str) -> int:
    """What a layer that is computed again holds while it rotates its queries.

    The gradient of its output; what came back of inputs, its own and the next; its input, normalised and projected; and
    values.
    """
    if recompute not in FORWARD_AGAIN:
        return 0
    moved = 0 if layer_bytes(of, recompute) else 2
    projected = of.element * (of.qkv + of.key) + of.rotation * of.query
    return norm_bytes(of) + (2 + moved) * of.state + of.positions * projected


def fp8_bytes(of: Tensors) -> int:
    """The largest factor of a matmul in fp8: fp8 and a copy in another order, or fp32 on the way if not compiled."""
    return of.fp8 * max(of.positions, of.hidden) * max(of.up, of.qkv)


def _tiles_bytes(of: Tensors) -> int:
    """The gradients of an MLP's weights in fp32, and seven halves of the gates of a tile."""
    return 6 * of.hidden * of.up + 7 * of.element * GATES_AT_ONCE // 2


def layer_weights_bytes(of: Tensors, recompute: str) -> int:
    """The same of the weights' part of a split backward: the gradient of the largest weight."""
    largest = _tiles_bytes(of) if in_tiles(of, recompute) else of.element * of.hidden * of.up
    return max(recomputed_bytes(of, recompute) + largest + fp8_bytes(of), rotating_bytes(of, recompute))
