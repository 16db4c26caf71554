"""What of a run goes through torch.compile. Pure."""

from __future__ import annotations

from megallama.config.schema import RunConfig
from megallama.layout.schedules import schedule_of

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
    return None


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
