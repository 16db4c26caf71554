"""The schema of a run: every key a YAML file may hold, what it means, and what it defaults to.

Pure: imports neither torch nor deepspeed, opens no file. Checks that need one section only live here; checks across
sections or against a world size live in `layout.check`.
"""

from __future__ import annotations

from math import prod
from typing import Annotated, Literal

from pydantic import (
    Field,
)

from megallama.config.data_keys import DataConfig
from megallama.config.train_keys import TrainConfig
from megallama.config.values import (
    MOST_LAYERS,
    MOST_PIPELINE,
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
    Real,
    Section,
    Sets,
)

IGNORE_INDEX = -100
"""Label of a position that is left out of the loss, as in torch."""


Schedule = Literal["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"]
ContextMode = Literal["gather", "ulysses"]


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
    qk_norm: bool = False
    """RMSNorm of each head's queries and keys before the rotation, as in Qwen3 (arXiv 2505.09388, 2302.05442)."""
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
    offload_optimizer: Literal["none", "cpu"] = "none"
    """cpu keeps masters and moments on the host and updates there (ZeRO-Offload, arXiv 2101.06840); at stage 1."""


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
    z_loss: Real = Field(default=0.0, ge=0)
    """Adds so much of the mean square of log(sum(exp(logits))) to what is minimised (arXiv 2204.02311); often 1e-4."""


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
    """Steps between `train` events."""
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
