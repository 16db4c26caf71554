"""The schema of a run: every key a YAML file may hold, what it means, and what it defaults to.

Pure: imports neither torch nor deepspeed, opens no file. Checks that need one section only live here; checks across
sections or against a world size live in `config.check`.
"""

from __future__ import annotations

import re
from decimal import Decimal
from itertools import pairwise
from math import gcd, prod
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

IGNORE_INDEX = -100
"""Label of a position that is left out of the loss, as in torch."""


class Section(BaseModel):
    """A frozen mapping with no unknown keys; the sentence under each field is its documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _number_from_text(value: object) -> object:
    """`3e-4` in YAML 1.1 is text, since it has no point; take it for the number that it is."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_MOST_TOKENS = 10**18


def _tokens_from_text(value: object) -> object:
    """`3T`, `1.5e9`, `20_000_000` and 3.0e12 as the whole number that each is, without rounding."""
    if not isinstance(value, str | float):
        return value
    text = str(value).strip().upper()
    unit = _SUFFIXES.get(text[-1:], 1)
    try:
        number = Decimal(text[:-1] if unit > 1 else text) * unit
    except ArithmeticError:
        number = Decimal("nan")
    if not number.is_finite() or abs(number) > _MOST_TOKENS:
        raise PydanticCustomError("tokens", "a whole number of tokens up to 1e18, such as 300B, 1.5e9 or 3T")
    whole = max(1, int(number))
    if number != whole:
        raise PydanticCustomError("tokens", "a whole number of tokens, at least 1; write {whole}", {"whole": whole})
    return whole


MOST_LAYERS, MOST_WIDTH, MOST_SEQUENCES, MOST_RANKS, MOST_STEPS = 2_000, 10**7, 10**9, 10**6, 10**12
"""Far beyond any run: a number above them is a slip of the hand, and would keep a plan busy for hours."""
MOST_PIPELINE, MOST_STAGES = 128, 512
"""A plan lays every action of every rank out in time."""
MOST_PATTERNS, MOST_SOURCES, MOST_RAMP_STAGES = 256, 10_000, 64
MOST_NAME_BYTES, MOST_PATH_BYTES = 255, 1000
"""Linux's limit on a component of a path, and sbatch's on a path, less what stands before and behind it."""


def _name(value: str) -> str:
    """A name or a path: it goes to files, logs, job files and terminals, some of which a line end would split."""
    if not value.isprintable():
        raise PydanticCustomError("name", "text without line ends, control characters and others that do not print")
    encoded = value.encode()
    if max(map(len, encoded.split(b"/"))) > MOST_NAME_BYTES or len(encoded) > MOST_PATH_BYTES:
        raise PydanticCustomError("name", f"names of at most {MOST_NAME_BYTES} bytes, {MOST_PATH_BYTES} in a path")
    return value


Name = Annotated[str, AfterValidator(_name)]
Real = Annotated[float, BeforeValidator(_number_from_text)]
Tokens = Annotated[
    int,
    Field(ge=1, le=_MOST_TOKENS),
    BeforeValidator(
        _tokens_from_text,
        json_schema_input_type=Annotated[int, Field(ge=1)]
        | Annotated[str, Field(pattern=r"^[0-9][0-9_.]*([eE][+-]?[0-9]+)?[kKmMbBtT]?$")],
    ),
]
Decay = Annotated[float, Field(ge=0, lt=1), BeforeValidator(_number_from_text)]


LayersPerStage = Annotated[tuple[Annotated[int, Field(ge=1, le=MOST_LAYERS)], ...], Field(max_length=MOST_LAYERS)]


def _tuple_from_list(value: object) -> object:
    """Behind a validator of the section before it a list is not taken for a tuple any more."""
    return tuple(value) if isinstance(value, list) else value


Patterns = Annotated[tuple[Name, ...], Field(max_length=MOST_PATTERNS), BeforeValidator(_tuple_from_list)]
SET_NAME = "[A-Za-z0-9_-]{1,64}"


def _check_set_names(sets: dict[str, str]) -> dict[str, str]:
    for name in sets:
        if not re.fullmatch(SET_NAME, name) or name in ("train", "validation"):
            rule = "names of 1 to 64 letters, digits, _ and -, and neither train nor validation, unlike {name}"
            raise PydanticCustomError("set_name", rule, {"name": repr(name[:60])})
    return sets


Sets = Annotated[
    dict[str, Name],
    AfterValidator(_check_set_names),
    Field(json_schema_extra={"propertyNames": {"pattern": f"^{SET_NAME}$"}}),
]
CheckpointPath = Annotated[Name, Field(pattern="/|^step_")]
"""Told from a word by its slash, or by the name of its folder."""
Schedule = Literal["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"]
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


class MixtureSource(Section):
    """One dataset of a mixture."""

    path: Name = Field(min_length=1)
    """Prefix of an indexed dataset, as data.path."""
    weight: Real = Field(gt=0)
    """Its part of the samples; weights need not sum to 1."""
    name: Annotated[Name, Field(min_length=1)] | None = None
    """What the run calls it; null means the last part of `path`. Its order of samples is drawn from it."""
    epochs: Annotated[Real, Field(gt=0)] | None = None
    """How often the run may read it; a run that would read more is refused at its start. null for no limit."""

    @property
    def called(self) -> str:
        """Its name, resolved."""
        return self.name or self.path.rstrip("/").rpartition("/")[2] or self.path


MixtureSources = Annotated[tuple[MixtureSource, ...], Field(min_length=1, max_length=MOST_SOURCES)]


class MixtureStage(Section):
    """The sources of a mixture from a step on."""

    from_step: int = Field(ge=0, le=MOST_STEPS)
    """Steps done when it begins; that of the first stage is 0."""
    sources: MixtureSources
    """What is read from there on; a source of an earlier stage goes on where it was."""


def _form_of_mixture(value: object) -> str:
    """Whether a mixture is written as one list of sources or as stages."""
    first = value[0] if isinstance(value, list | tuple) and value else value
    staged = {"from_step", "sources"} & first.keys() if isinstance(first, dict) else isinstance(first, MixtureStage)
    return "stages" if staged else "sources"


Mixture = Annotated[
    Annotated[MixtureSources, Tag("sources")]
    | Annotated[tuple[MixtureStage, ...], Field(max_length=MOST_SOURCES), Tag("stages")],
    Discriminator(_form_of_mixture),
]


class DataConfig(Section):
    """Datasets and tokenizer."""

    path: Name | None = None
    """Prefix of an indexed dataset, PATH.bin and PATH.idx, written by `megallama data build` or Megatron-LM."""
    mixture: Mixture | None = None
    """In place of `path`: several datasets by weight, as a list of sources, or as stages that begin at given steps."""
    tokenizer: Name = "bytes"
    """`bytes`, a tiktoken encoding (r50k_base), a tiktoken rank file, a folder from `tokenizer train`, or hf:FILE."""
    sequence_length: int = Field(default=2048, ge=1, le=MOST_SEQUENCES)
    """Predicted tokens per sample."""
    validation_path: Name | None = None
    """Prefix of a separate validation dataset; null uses the tail of `path`, or of each source of the mixture."""
    validation_fraction: Real = Field(default=0.01, ge=0, lt=1)
    """Share of the documents, at the end of each dataset, that is held out if validation_path is null."""
    pack: Literal["all", "one"] = "all"
    """all: samples are cut from all documents in a row; one: each is one document, cut off or filled up."""
    document_mask: bool = False
    """Attention and positions stay within documents: tokens see those of their own, and each begins at position 0."""
    truncate: Literal["first", "last"] = "first"
    """pack=one: which tokens are kept of a document that is longer than sequence_length."""
    pad: Literal["right", "left"] = "right"
    """pack=one: where a sample is filled up whose document is shorter; no label counts there, and no token sees it."""
    eod_mask_loss: bool = False
    """Exclude the prediction of end-of-document tokens from the loss."""

    @property
    def documents_apart(self) -> bool:
        """Whether attention has to know documents; what fills up a sample at its end is seen by none anyway."""
        return self.document_mask or self.pad == "left"

    @property
    def stages(self) -> tuple[MixtureStage, ...]:
        """The stages of the mixture, the one list of sources being the only stage; none with `path`."""
        stages: list[MixtureStage] = []
        sources: list[MixtureSource] = []
        for each in self.mixture or ():
            if isinstance(each, MixtureStage):
                stages.append(each)
            else:
                sources.append(each)
        return tuple(stages) or ((MixtureStage(from_step=0, sources=tuple(sources)),) if sources else ())

    @model_validator(mode="after")
    def _one_source_of_data(self) -> Self:
        if (self.path is None) == (self.mixture is None):
            raise PydanticCustomError("sentence", _SOURCE_SAID[self.path is None], {"path": self.path})
        if wrong := _wrong_mixture(self.stages):
            raise PydanticCustomError("sentence", "data.mixture: {wrong}", {"wrong": wrong})
        return self


_SOURCE_SAID = {
    False: "data.path={path} and data.mixture both say what the run reads; leave one of them out, or set one to null: "
    "data.path=null or data.mixture=null",
    True: "data.path is missing; write it in the file or give data.path=VALUE, or several datasets as data.mixture",
}


def _wrong_mixture(stages: tuple[MixtureStage, ...]) -> str | None:
    """What is wrong between the stages of a mixture or their sources, and how to mend it."""
    if stages and stages[0].from_step:
        return f"the first stage is from_step={stages[0].from_step}; let it begin with the run, from_step=0"
    for one, other in pairwise(stages):
        if other.from_step <= one.from_step:
            return (
                f"the stage from_step={other.from_step} follows from_step={one.from_step}; use from_step="
                f"{one.from_step + 1} or more"
            )
    paths: dict[str, str] = {}
    names: dict[str, str] = {}
    for stage in stages:
        seen: set[str] = set()
        for source in stage.sources:
            name, path = source.called, source.path
            if name in seen or paths.setdefault(name, path) != path:
                return f"two sources have the name {name}; give one of them another name"
            if names.setdefault(path, name) != name:
                return f"{path} has two names, {names[path]} and {name}; use one source, with the sum of the weights"
            seen.add(name)
    return None


class ParallelConfig(Section):
    """Layout of one copy of the model. The data-parallel size follows from the world size."""

    tensor: int = Field(default=1, ge=1, le=MOST_RANKS)
    """tp: ranks that share each weight matrix; keep it within one node (arXiv 1909.08053)."""
    pipeline: int = Field(default=1, ge=1, le=MOST_PIPELINE)
    """pp: ranks that share the layers."""
    context: int = Field(default=1, ge=1, le=MOST_RANKS)
    """cp: ranks that share each sequence."""
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
        return {"pp": self.pipeline, "cp": self.context, "tp": self.tensor}

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
    """1 partitions the optimizer state over data-parallel ranks, 2 also the gradients, 3 also the parameters."""
    bucket_elements: int = Field(default=100_000_000, ge=1, le=MOST_STEPS)
    """Elements per collective when reducing gradients and gathering parameters; ZeRO 3 gathers twice as many ahead."""
    communication_dtype: Literal["bf16", "fp32"] = "fp32"
    """Type of gradients in the reduction over data-parallel ranks; bf16 halves the bytes and rounds the sums."""


class RampStage(Section):
    """A batch that a run has at its beginning, before that of train.global_batch_size."""

    global_batch_size: int = Field(ge=1, le=MOST_SEQUENCES)
    """Sequences per optimizer step over all ranks."""
    until: Tokens
    """Tokens of the run, such as 252M: the first step that begins with as many seen has the next batch."""


def _check_ramp(ramp: tuple[RampStage, ...]) -> tuple[RampStage, ...]:
    for number, (one, after) in enumerate(pairwise(ramp), 1):
        if after.until <= one.until:
            raise _refused(
                f"train.batch_ramp[{number}].until={after.until} is not more than the {one.until} of the stage before; "
                f"nearest legal: train.batch_ramp[{number}].until={one.until + 1}"
            )
    return ramp


Ramp = Annotated[
    tuple[RampStage, ...],
    Field(max_length=MOST_RAMP_STAGES),
    AfterValidator(_check_ramp),
    BeforeValidator(_tuple_from_list),
]


def _refused(sentence: str) -> PydanticCustomError:
    return PydanticCustomError("sentence", "{sentence}", {"sentence": sentence})


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
    """Sequences per forward on one data-parallel rank."""
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
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations recomputed in backward: none, the SwiGLU product, or whole layers."""
    freeze: Patterns = ()
    """Weights that stay as they are, by patterns of their Hugging Face names: model.embed_tokens.weight, "*norm*"."""
    max_minutes: Annotated[Real, Field(gt=0)] | None = None
    """Save and end as `requeue`, early enough for the save to end this many minutes after the process began."""
    max_skipped: int = Field(default=100, ge=1, le=MOST_STEPS)
    """The run fails after this many steps in a row with a gradient that is not finite."""
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
            raise _refused(_LENGTH_SAID[self.tokens is None].format(steps=self.steps, tokens=self.tokens))
        return self

    @model_validator(mode="after")
    def _batches_grow(self) -> Self:
        for number, (batch, after) in enumerate(pairwise(self.batches)):
            if batch >= after:
                key = f"train.batch_ramp[{number}].global_batch_size={batch}"
                last = number + 1 == len(self.batch_ramp)
                then = "train.global_batch_size" if last else f"train.batch_ramp[{number + 1}].global_batch_size"
                legal = f"nearest legal: {then}={batch + 1}"
                raise _refused(f"{key} is not less than {then}={after}, which follows; {legal}")
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
    sets: Sets = {}
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
    wandb: WandbConfig | None = None
    """Weights & Biases; null for none."""


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
    watchdog: WatchdogConfig = WatchdogConfig()
    logging: LoggingConfig = LoggingConfig()

    @property
    def tokens_per_step(self) -> int:
        """Predicted tokens in one optimizer step."""
        return self.train.global_batch_size * self.data.sequence_length
