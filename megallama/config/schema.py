"""The schema of a run: every key a YAML file may hold, what it means, and what it defaults to.

Pure: imports neither torch nor deepspeed, opens no file. Checks that need one section only live here; checks across
sections or against a world size live in `layout.check`.
"""

from __future__ import annotations

from itertools import pairwise
from math import gcd, prod
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    model_validator,
)

from megallama.config.data_keys import DataConfig
from megallama.config.values import (
    MOST_LAYERS,
    MOST_PIPELINE,
    MOST_RAMP_STAGES,
    MOST_RANKS,
    MOST_REWINDS,
    MOST_SEQUENCES,
    MOST_STEPS,
    MOST_WIDTH,
    MOST_WINDOW,
    CheckpointPath,
    Decay,
    LayersPerStage,
    Name,
    Patterns,
    Real,
    Section,
    Sets,
    Tokens,
    refused,
    tuple_from_list,
)

IGNORE_INDEX = -100
"""Label of a position that is left out of the loss, as in torch."""


Schedule = Literal["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"]
ContextMode = Literal["gather", "ulysses"]
Objective = Literal["causal", "masked"]


class RopeScaling(Section):
    """Scaling of the rotary frequencies beyond the trained length, with the names of Hugging Face's Llama."""

    rope_type: Literal["linear", "llama3"]
    """linear (arXiv 2306.15595) or llama3 (arXiv 2407.21783, Llama 3.1 and 3.2)."""
    factor: Real = Field(gt=0)
    """Factor by which wavelengths are stretched."""
    low_freq_factor: Real = Field(default=1.0, gt=0)
    """llama3: wavelengths above original_max_position_embeddings / low_freq_factor are stretched by the full factor."""
    high_freq_factor: Real = Field(default=4.0, gt=0)
    """llama3: wavelengths below original_max_position_embeddings / high_freq_factor are not stretched."""
    original_max_position_embeddings: int = Field(default=8192, ge=1, le=MOST_SEQUENCES)
    """llama3: sequence length of the original training."""


class ModelConfig(Section):
    """Shape of the Llama, with Hugging Face's names."""

    vocab_size: int = Field(ge=1, le=MOST_WIDTH)
    """Size of the vocabulary; padded in memory for speed, but not in checkpoints."""
    hidden_size: int = Field(ge=1, le=MOST_WIDTH)
    """Width of the residual stream."""
    intermediate_size: int = Field(ge=1, le=MOST_WIDTH)
    """Width of the MLP."""
    num_hidden_layers: int = Field(ge=1, le=MOST_LAYERS)
    """Number of decoder layers."""
    num_attention_heads: int = Field(ge=1, le=MOST_WIDTH)
    """Number of query heads."""
    num_key_value_heads: int | None = Field(default=None, ge=1, le=MOST_WIDTH)
    """Number of key and value heads (arXiv 2305.13245); null means as many as query heads."""
    head_dim: int | None = Field(default=None, ge=2, le=MOST_WIDTH)
    """Size of one head; null means hidden_size / num_attention_heads."""
    max_position_embeddings: int = Field(default=2048, ge=1, le=MOST_SEQUENCES)
    """Longest sequence that the model supports."""
    rms_norm_eps: Real = Field(default=1e-5, gt=0)
    """Epsilon of RMSNorm, added to the mean square."""
    rope_theta: Real = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    rope_scaling: RopeScaling | None = None
    """Scaling of the rotary frequencies; null for none."""
    tie_word_embeddings: bool = False
    """Share the weights of the embedding and the output head."""
    block: Literal["llama", "gpt"] = "llama"
    """gpt: an MLP of two matrices and no rotary embedding; only for `megallama plan`, to plan published runs."""
    init: Literal["normal", "kaiming_uniform", "xavier_uniform"] = "normal"
    """normal: std initializer_range, divided by sqrt(2 * layers) for output projections (GPT-2); or uniform by fan."""
    initializer_range: Real = Field(default=0.02, gt=0)
    """Standard deviation of the normal initialisation."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Size of one head, resolved."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def mlp_matrices(self) -> int:
        """Matrices of the MLP."""
        return 3 if self.block == "llama" else 2


class RunSection(Section):
    """Location of the run."""

    dir: Name = Field(default="runs/default", min_length=1)
    """Run directory, for config, metrics, checkpoints and tokenizer."""


AXIS_KEYS = {"pp": "pipeline", "cp": "context", "tp": "tensor"}
"""Keys of the sizes of all axes of the mesh but dp, by the axis."""


class ParallelConfig(Section):
    """Layout of one copy of the model. The data-parallel size follows from the world size."""

    tensor: int = Field(default=1, ge=1, le=MOST_RANKS)
    """tp: ranks that share each weight matrix; keep it within one node (arXiv 1909.08053)."""
    pipeline: int = Field(default=1, ge=1, le=MOST_PIPELINE)
    """pp: ranks that share the layers."""
    context: int = Field(default=1, ge=1, le=MOST_RANKS)
    """cp: ranks that share each sequence, each with a slice of its head and one of its tail."""
    context_mode: ContextMode = "gather"
    """Attention gathers keys and values (arXiv 2407.21783, 3.3.2), or exchanges sequence for heads (2309.14509)."""
    sequence: bool | None = None
    """Sequence parallelism between the tensor-parallel regions (arXiv 2205.05198); null means on if tensor > 1."""
    schedule: Schedule = "1f1b"
    """Pipeline schedule: one stage per rank (1f1b), several (interleaved1f1b), or two in a V (the others)."""
    chunks: int = Field(default=2, ge=2, le=MOST_LAYERS)
    """Stages per rank for interleaved1f1b; 1f1b has one, the V-shaped schedules two."""
    layers_per_stage: LayersPerStage | Literal["balanced", "even"] = "balanced"
    """Decoder layers of each stage, in model order; balanced counts the work of the output head, even does not."""

    @property
    def sizes(self) -> dict[str, int]:
        """Of every axis of the mesh but dp, which is what the world size leaves over."""
        return {axis: getattr(self, key) for axis, key in AXIS_KEYS.items()}

    @property
    def model_ranks(self) -> int:
        """Ranks of one copy of the model."""
        return prod(self.sizes.values())

    @property
    def sequence_parallel(self) -> bool:
        """Whether activations between tensor-parallel regions are cut along the sequence."""
        return self.tensor > 1 if self.sequence is None else self.sequence and self.tensor > 1


class ZeroConfig(Section):
    """DeepSpeed ZeRO (arXiv 1910.02054)."""

    stage: int = Field(default=1, ge=0, le=3)
    """1 partitions the optimizer state over the ranks of dp * cp, 2 also the gradients, 3 also the parameters."""
    bucket_elements: int = Field(default=100_000_000, ge=1, le=MOST_STEPS)
    """Elements per collective when reducing gradients and gathering parameters; ZeRO 3 gathers twice as many ahead."""
    communication_dtype: Literal["bf16", "fp32"] = "fp32"
    """Type of gradients in the reduction over the ranks of dp * cp; bf16 halves the bytes and rounds the sums."""


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
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses CUDA if there is a GPU."""
    seed: int = Field(default=1234, ge=0, lt=2**63)
    """Seed of initialisation, sample order and masks, the same at every layout."""
    recompute: Literal["none", "selective", "full", "offload"] = "none"
    """Activations recomputed in backward: none, the SwiGLU product, whole layers; offload: their inputs on the host."""
    freeze: Patterns = ()
    """Weights that stay as they are, by patterns of their Hugging Face names: model.embed_tokens.weight, "*norm*"."""
    max_minutes: Annotated[Real, Field(gt=0)] | None = None
    """Save and end as `requeue`, early enough for the save to end this many minutes after the process began."""
    max_skipped: int = Field(default=100, ge=1, le=MOST_STEPS)
    """After this many steps in a row without an update the run goes back (health.max_rewinds), or fails."""
    compile: bool = False
    """Run each layer through torch.compile; needs a compiler, and zero.stage below 3."""
    deterministic: bool = False
    """Use deterministic kernels only: on a GPU, the backward of attention is otherwise not the same in every run."""

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


class OptimizerConfig(Section):
    """AdamW (arXiv 1711.05101)."""

    lr: Real = Field(default=3e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """Decay rates of the first and second moment."""
    eps: Real = Field(default=1e-8, gt=0)
    """Epsilon, added to the root of the second moment."""
    weight_decay: Real = Field(default=0.1, ge=0)
    """Decoupled weight decay of matrices and embeddings, not of norms."""
    clip: Real = Field(default=1.0, gt=0)
    """Maximum norm of the global gradient."""


class ScheduleConfig(Section):
    """Learning rate schedule."""

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Shape after warm-up; wsd holds the peak and decays linearly over the last decay_steps."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps of linear warm-up from zero."""
    min_lr: Real = Field(default=0.0, ge=0)
    """Learning rate at the last step; not used by constant."""
    decay_steps: int | None = Field(default=None, ge=1, le=MOST_STEPS)
    """wsd: steps of the final decay; null means a tenth of the run."""


class EvaluationConfig(Section):
    """Loss on validation and training data."""

    every: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps between evaluations; 0 evaluates only at the beginning and the end."""
    samples: int = Field(default=64, ge=1, le=MOST_SEQUENCES)
    """Sequences per split and set, rounded up to whole micro-batches over all ranks."""
    sets: Sets = Field(default={})
    """More validation sets by name, as prefixes of datasets: {web: data/web, code: data/code}."""


class CheckpointConfig(Section):
    """Saving and resuming."""

    every: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps between saves; 0 saves only at the end."""
    keep: int = Field(default=2, ge=1, le=MOST_STEPS)
    """Number of newest healthy checkpoints to keep; the one with the lowest validation loss is kept as well."""
    keep_every: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Keep checkpoints of steps that are multiples of this forever; 0 for none."""
    asynchronous: bool = True
    """Continue training while a separate process writes; false waits for the save."""
    max_failures: int = Field(default=3, ge=1, le=MOST_STEPS)
    """The run fails after this many failed saves in a row."""
    resume: Literal["auto", "must", "never"] | Annotated[int, Field(ge=1, le=MOST_STEPS)] | CheckpointPath = "auto"
    """auto continues or starts fresh; must only continues; never starts fresh; a step or path goes back to it once."""
    init_from: Name | None = None
    """Checkpoint, or folder of a Hugging Face or Meta Llama, whose weights start a new run from step 0."""


class HealthConfig(Section):
    """What a run does about steps that stand out of those before them."""

    spike_deviations: Annotated[Real, Field(gt=0)] | None = 6.0
    """Skip a step whose loss or gradient norm is so many standard deviations above their recent mean; null for none."""
    window: int = Field(default=128, ge=8, le=MOST_WINDOW)
    """Number of recent updates whose losses and norms are compared with; none is skipped before half of them."""
    max_rewinds: int = Field(default=3, ge=0, le=MOST_REWINDS)
    """Times that the run goes back to a checkpoint and passes over samples after train.max_skipped, before it fails."""
    compare_every: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps between comparisons of what several ranks hold, bit by bit; a difference ends the run. 0 for none."""


class WatchdogConfig(Section):
    """When a step, an evaluation or a save counts as hung. Each rank then writes its stacks, and the run ends."""

    factor: Real = Field(default=10.0, gt=1)
    """Time limit as a multiple of the recent median of steps, evaluations or saves."""
    least_seconds: Real = Field(default=300.0, gt=0)
    """Lower bound of the time limit, in seconds."""
    first_seconds: Real = Field(default=1800.0, gt=0)
    """Lower bound for the first step, the first evaluation and every save, in seconds."""


class WandbConfig(Section):
    """Weights & Biases."""

    project: Name
    """Project name."""
    name: Name | None = None
    """Name of the run; null uses the name of the run directory."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to the run directory and needs no account."""


class LoggingConfig(Section):
    """Logging."""

    every: int = Field(default=1, ge=1, le=MOST_STEPS)
    """Steps between `train` events; each one synchronizes with the device once."""
    layers_every: int = Field(default=0, ge=0, le=MOST_STEPS)
    """Steps between `layers` events, with norms of each layer's output and of its gradient; 0 for none."""
    wandb: WandbConfig | None = None
    """Weights & Biases; null for none."""
    tensorboard: bool = False
    """Write all numbers of the run to RUN/tensorboard as well; needs the extra `tensorboard`."""


class RunConfig(Section):
    """One training run."""

    run: RunSection = RunSection()
    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = ParallelConfig()
    zero: ZeroConfig = ZeroConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    watchdog: WatchdogConfig = WatchdogConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens in one optimizer step."""
        return self.train.global_batch_size * self.data.sequence_length
