"""The keys of `train`: how long a run is, its batches, precision, and what it keeps and looks at beside the weights."""

from __future__ import annotations

from itertools import pairwise
from math import gcd
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from megallama.config.values import (
    MOST_AVERAGED,
    MOST_RAMP_STAGES,
    MOST_SEQUENCES,
    MOST_STEPS,
    Patterns,
    Ranks,
    Real,
    Section,
    Steps,
    Tokens,
    refused,
    tuple_from_list,
)

Objective = Literal["causal", "masked"]


class RampStage(Section):
    """A batch that a run has at its beginning, before that of train.global_batch_size."""

    global_batch_size: int = Field(ge=1, le=MOST_SEQUENCES)
    """Sequences per optimizer step over all ranks."""
    until: Tokens
    """Tokens of the run, such as 252M: the first step that begins with as many seen has the next batch."""


def _check_ramp(ramp: tuple[RampStage, ...]) -> tuple[RampStage, ...]:
    for number, (one, after) in enumerate(pairwise(ramp), 1):
        if after.until <= one.until:
            raise refused(
                f"train.batch_ramp[{number}].until={after.until} is not more than the {one.until} of the stage before; "
                f"nearest legal: train.batch_ramp[{number}].until={one.until + 1}"
            )
    return ramp


Ramp = Annotated[
    tuple[RampStage, ...],
    Field(max_length=MOST_RAMP_STAGES),
    AfterValidator(_check_ramp),
    BeforeValidator(tuple_from_list),
]


class ProfileConfig(Section):
    """Traces of torch's profiler, in RUN/traces: a file for each listed step and rank. A traced step takes longer."""

    steps: Steps = ()
    """Steps to trace, as [10, 12]; those before the one where a start continues are passed over."""
    ranks: Ranks = (0,)
    """Ranks that trace them."""


class AverageConfig(Section):
    """An average of the weights beside them: saved, evaluated and exported, while training goes on with the weights."""

    kind: Literal["none", "exponential", "latest"] = "none"
    """exponential: of the weights after every update; latest: of the newest checkpoints (LAWA, arXiv 2209.14981)."""
    decay: Real = Field(default=0.999, gt=0, lt=1)
    """exponential: what an update leaves of the average; never more than n / (n + 9) after n updates."""
    checkpoints: int = Field(default=5, ge=2, le=MOST_AVERAGED)
    """latest: number of healthy checkpoints in the mean, with the one being saved; checkpoint.keep must be as large."""


_LENGTH_SAID = {
    False: "train.steps={steps} and train.tokens={tokens} both say how long the run is; leave one of them out, or set "
    "one to null: train.steps=null or train.tokens=null",
    True: "train.steps=null and train.tokens=null say no length; use train.steps=chinchilla, or train.tokens=300B",
}


class TrainConfig(Section):
    """Length of the run, batch size, precision and limits."""

    steps: Annotated[int, Field(ge=1, le=MOST_STEPS)] | Literal["chinchilla"] | None = "chinchilla"
    """Optimizer steps; `chinchilla` trains on the compute-optimal tokens for this model size; null with tokens."""
    tokens: Tokens | None = None
    """Tokens, instead of steps: 3T, 300B, 1.5e9; the run ends with the first step that reaches them."""
    objective: Objective = "causal"
    """causal predicts the next token; masked those that are hidden, from both sides (BERT, arXiv 1810.04805)."""
    mask_probability: Real = Field(default=0.15, gt=0, le=1)
    """masked: share of the tokens that are predicted; ends of documents are not among them."""
    stop_after: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """Save and end with exit code 0 after this step; the learning rate still spans the whole run."""
    micro_batch_size: int = Field(default=1, ge=1, le=MOST_SEQUENCES)
    """Sequences per forward on one data-parallel rank; those of cp share them."""
    global_batch_size: int = Field(default=1, ge=1, le=MOST_SEQUENCES)
    """Sequences per optimizer step over all ranks."""
    batch_ramp: Ramp = ()
    """Smaller batches at the beginning, as [{global_batch_size: 64, until: 252M}], until so many tokens are seen."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations; master weights, moments and gradient sums are always fp32."""
    matmul: Literal["dtype", "fp8", "fp8_emulated"] = "dtype"
    """Products of the decoder's linear layers: in train.dtype, or fp8 on a GPU that has it; emulated is for tests."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if there is a GPU."""
    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Seed of initialisation, sample order and masks, the same at every layout."""
    recompute: Literal["none", "selective", "full", "offload"] = "none"
    """Recomputed in backward: none, elementwise work (selective), whole layers; offload: their inputs on the host."""
    freeze: Patterns = ()
    """Weights that stay as they are, by patterns of their Hugging Face names: model.embed_tokens.weight, "*norm*"."""
    average: AverageConfig = AverageConfig()
    """An average of the weights."""
    max_minutes: Annotated[Real, Field(gt=0)] | None = None
    """Save and end as `requeue`, early enough for the save to end this many minutes after the process began."""
    max_skipped: int = Field(default=100, ge=1, le=MOST_STEPS)
    """After this many steps in a row without an update the run goes back (health.max_rewinds), or fails."""
    compile: Literal["auto"] | bool = "auto"
    """Compile layers and loss by torch.compile; auto: on a GPU, what the layout lets. Needs a compiler."""
    deterministic: bool = False
    """Use deterministic kernels only: on a GPU, the backward of attention is otherwise not the same in every run."""
    profile: ProfileConfig = ProfileConfig()
    """Steps and ranks of which a trace is written."""
    memory_history: bool = False
    """On a GPU, record who allocates memory, for the snapshot that a run out of memory leaves; costs some speed."""

    @property
    def batches(self) -> tuple[int, ...]:
        """Sequences per optimizer step, of the ramp's stages and of what follows, ever more."""
        return (*(stage.global_batch_size for stage in self.batch_ramp), self.global_batch_size)

    @property
    def common_batch(self) -> int:
        """The largest number of sequences that divides them all."""
        return gcd(*self.batches)

    @model_validator(mode="before")
    @classmethod
    def _tokens_take_the_place_of_the_default(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("tokens") is not None and "steps" not in given:
            return {**given, "steps": None}
        return given

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise refused(_LENGTH_SAID[self.tokens is None].format(steps=self.steps, tokens=self.tokens))
        return self

    @model_validator(mode="after")
    def _batches_grow(self) -> Self:
        for number, (batch, after) in enumerate(pairwise(self.batches)):
            if batch >= after:
                key = f"train.batch_ramp[{number}].global_batch_size={batch}"
                last = number + 1 == len(self.batch_ramp)
                then = "train.global_batch_size" if last else f"train.batch_ramp[{number + 1}].global_batch_size"
                legal = f"nearest legal: {then}={batch + 1}"
                raise refused(f"{key} is not less than {then}={after}, which follows; {legal}")
        return self
