"""What of a run goes through torch.compile. Pure."""

from __future__ import annotations

from megallama.config.schema import RunConfig
from megallama.layout.counts import FORWARD_AGAIN, GATES_AT_ONCE
from megallama.layout.schedules import schedule_of

LEAST_FLEX_HEAD = 16
"""Triton multiplies no narrower matrices, and with them torch's flex attention."""
TORCHS_BLOCK = 512
"""Keys that torch's attention on a CPU takes at a time."""


def why_not_compiled(config: RunConfig) -> str | None:
    """Why the layers of this run cannot be compiled, with what would do; None if they can."""
    if config.zero.stage == 3:
        # ZeRO 3 gathers and drops weights in hooks: 12 layers became 26 graphs with 40 breaks.
        return (
            "train.compile=true gains nothing at zero.stage=3, which gathers each layer's weights between its graphs; "
            "use zero.stage=2, or train.compile=auto"
        )
    if config.parallel.pipeline > 1 and schedule_of(config.parallel).splits_backward != "never":
        return (
            f"train.compile=true does not go with parallel.schedule={config.parallel.schedule}, which runs a backward "
            "in two parts; use train.compile=auto, or parallel.schedule=interleaved1f1b"
        )
    if config.parallel.tensor > 1 and config.parallel.sequence_parallel:
        # In one graph torch keeps what the forward gathered for the backward: tp times as much of each input.
        return (
            f"train.compile=true would keep the inputs of layers whole at parallel.tensor={config.parallel.tensor}, "
            "where sequence parallelism cuts them; use train.compile=auto, or parallel.sequence=false"
        )
    if mlp_in_tiles(config):
        # Tiles are no part of a graph, and torch drops a layer whose recomputation it cannot trace to the end.
        return (
            f"train.compile=true does not go with train.recompute={config.train.recompute} for so many tokens, of "
            "which the MLP is computed in tiles; use train.compile=auto, or train.recompute=selective"
        )
    return None


def mlp_in_tiles(config: RunConfig) -> bool:
    """Whether a backward computes the MLP of a micro-batch again in tiles (model/tiled_mlp.py)."""
    model, parallel = config.model, config.parallel
    tokens = config.train.micro_batch_size * config.data.sequence_length // parallel.context
    gates = 2 * model.intermediate_size // parallel.tensor
    return config.train.recompute in FORWARD_AGAIN and tokens * gates > GATES_AT_ONCE


def compiles_attention(config: RunConfig, on_gpu: bool) -> bool:
    """Whether attention is compiled in any case: on a GPU that of documents, which else would hold whole squares."""
    return on_gpu and config.data.documents_apart and config.model.head_size >= LEAST_FLEX_HEAD


def attends_in_blocks(config: RunConfig, on_gpu: bool) -> bool:
    """Whether causal attention goes by other blocks than those of torch's kernel, in bf16 at scores rounded to it."""
    train = config.train
    if on_gpu or train.compile is not True or train.objective != "causal":
        return False
    # In fp32 torch's is the slower one while all keys are one block of its own, half of which is masked.
    return train.dtype == "bf16" or config.data.sequence_length <= TORCHS_BLOCK


def compiles(config: RunConfig, on_gpu: bool) -> bool:
    """Whether the passes over logits, the rotations and the activation are compiled, which goes with every layout.

    On a CPU the compiler takes half a minute and longer, and gains 7 %: only who asks for it has it there.
    """
    return on_gpu if config.train.compile == "auto" else config.train.compile


def compiles_layers(config: RunConfig, on_gpu: bool) -> bool:
    """Whether each decoder layer is compiled whole."""
    return compiles(config, on_gpu) and why_not_compiled(config) is None
