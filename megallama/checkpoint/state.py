"""What the state.json of a checkpoint says: where the run stood, in which data, with which model. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megallama.checkpoint.format import (
    LARGEST,
    LARGEST_STATE,
    STATE,
    Count,
    TornCheckpointError,
    complete_checkpoints,
    malformed,
    read_manifest,
)
from megallama.checkpoint.tensors import average_name
from megallama.config.schema import ModelConfig
from megallama.config.train_keys import Objective
from megallama.config.values import MOST_AVERAGED, MOST_REWINDS, MOST_SEQUENCES, MOST_WINDOW, Name, Patterns
from megallama.errors import UserError
from megallama.layout.budget import NOTHING_SEEN, Seen, begun_stages, place, united
from megallama.layout.check import check_trained
from megallama.layout.frozen import frozen_weights
from megallama.system.regular_file import read_regular

if TYPE_CHECKING:
    from megallama.config.schema import RunConfig

_LARGEST_BATCH = 1 << 31
"""Sequences of a step; more than a run ever had."""
Batch = Annotated[int, Field(ge=1, lt=_LARGEST_BATCH)]
Part = Annotated[float, Field(gt=0, lt=_LARGEST_BATCH, allow_inf_nan=False)]
Weight = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Loss = Annotated[float, Field(allow_inf_nan=False)]
Measured = Annotated[float, Field(ge=-1e60, le=1e60)]
"""Whose squares can be added up; the norm of a gradient in fp32 is below."""


@dataclass(frozen=True)
class TrainState:
    """Everything that progresses, beside weights and moments."""

    step: Count = 0
    """Optimizer steps done."""
    samples: Count = 0
    """Sequences consumed, of `DataIdentity.sequence_length`: the position in the data."""
    updates: Count = 0
    """Steps whose update was applied; fewer than `step` where some were skipped."""
    validation_loss: Loss | None = None
    """The loss of these very weights, where it was evaluated and is finite."""
    first_batch: Batch | Part | None = None
    """Sequences of the first step, the unit of a schedule by tokens; older checkpoints do not say.

    A part of one where the run goes on by longer sequences.
    """
    stages: tuple[Count, ...] = ()
    """The first sample of each stage of `data.mixture`, as far as is known; a checkpoint has those that have begun."""
    last_batch: Annotated[int, Field(ge=0, lt=_LARGEST_BATCH)] = 0
    """Sequences of the last step; 0 where it is not known."""
    skipped: Count = 0
    """Steps in a row, up to this one, whose update was not applied."""
    skipped_samples: Count = 0
    """The sequences of these steps."""
    rewinds: Annotated[int, Field(ge=0, le=MOST_REWINDS)] = 0
    """Times that the run went back by itself."""
    passed_over: Annotated[tuple[tuple[Count, Count], ...], Field(max_length=MOST_REWINDS)] = ()
    """Ranges [first, end) in the order of the data that training leaves out; `samples` does not count them."""
    losses: Annotated[tuple[Measured, ...], Field(max_length=MOST_WINDOW)] = ()
    """Of the last steps that were applied, the newest last: what tells a spike."""
    norms: Annotated[tuple[Measured, ...], Field(max_length=MOST_WINDOW)] = ()
    """The norms of their gradients."""

    @property
    def seen(self) -> Seen:
        """How far the run is."""
        return Seen(self.step, self.samples, self.first_batch, self.stages, self.passed_over)

    def after(self, samples: int, *, applied: bool) -> TrainState:
        """The state one step of `samples` sequences later."""
        return replace(
            self,
            step=self.step + 1,
            samples=self.samples + samples,
            updates=self.updates + applied,
            validation_loss=None,
            last_batch=samples,
            skipped=0 if applied else self.skipped + 1,
            skipped_samples=0 if applied else self.skipped_samples + samples,
        )

    def in_sequences_of(self, length: int, before: int) -> TrainState:
        """The same tokens in sequences of `length`, which were of `before`; up to one sequence more.

        The schedule's unit is as many tokens as before, where need be a part of a sequence; a loss at another length is
        not known. What was passed over is forgotten, since the sequences have another order, and so are the losses.
        """
        if length == before:
            return self
        first = self.first_batch and self.first_batch * before / length
        counts = self.samples, self.skipped_samples, *self.stages
        samples, skipped, *stages = (-(-count * before // length) for count in counts)
        return replace(
            self,
            samples=samples,
            skipped_samples=skipped,
            first_batch=first,
            validation_loss=None,
            stages=tuple(stages),
            passed_over=(),
            losses=(),
            norms=(),
        )


@dataclass(frozen=True)
class StageWeights:
    """A stage of `data.mixture`."""

    from_step: Count
    weights: dict[Name, Weight]
    """By the name of the source."""


@dataclass(frozen=True)
class DataIdentity:
    """What a position in the data refers to: another dataset or seed would make it point elsewhere, silently."""

    fingerprint: Annotated[str, Field(max_length=1000)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    sequence_length: Annotated[int, Field(ge=1, le=MOST_SEQUENCES)] | None = None
    """Tokens of the sequences that a position counts; older checkpoints do not say, and go on at their own alone."""
    mixture: tuple[StageWeights, ...] = ()
    """The stages that have begun, for whoever reads it: the fingerprint covers them."""


@dataclass(frozen=True)
class Averaged:
    """What the average of the weights in a checkpoint is."""

    kind: Literal["exponential", "latest"]
    steps: Annotated[tuple[Count, ...], Field(max_length=MOST_AVERAGED)] = ()
    """latest: of the checkpoints that it is the mean of, the newest first."""


class Saved(BaseModel):
    """What a state.json says to whoever goes on from its checkpoint."""

    model_config = ConfigDict(frozen=True)

    state: TrainState
    data: DataIdentity
    model: ModelConfig
    loss: Loss | None
    healthy: bool = True
    """Whether the run was going well; older checkpoints do not say."""
    objective: Objective = "causal"
    """What the weights were trained towards; older checkpoints, which do not say, are causal."""
    freeze: Patterns = ()
    """`train.freeze` of the run: what it matches has no moments; where it is empty it is not written."""
    average: Averaged | None = None
    """Of the weights that are not frozen; without one it is not written."""
    z_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """`optimizer.z_loss` of the run, which the norms of its gradients depend on; 0 is not written."""

    @property
    def frozen(self) -> frozenset[str]:
        """The weights that have no moments."""
        return frozen_weights(self.model, self.freeze)

    def state_at(self, sequence_length: int) -> TrainState:
        """Where a run of such sequences is when it goes on from here."""
        return self.state.in_sequences_of(sequence_length, self.data.sequence_length or sequence_length)


def data_identity(
    config: RunConfig, fingerprint: Callable[[int, int], str], sequence_length: int, seen: Seen
) -> DataIdentity:
    """What the position of a checkpoint counts in, of a run with such sequences that is as far as `seen`.

    What the run reads later is not in it, and may change. `fingerprint` is that of the data's first stages.
    """
    count = begun_stages(config, seen)
    begun = tuple(
        StageWeights(stage.from_step, {source.called: source.weight for source in stage.sources})
        for stage in config.data.stages[:count]
    )
    return DataIdentity(fingerprint(sequence_length, count), config.train.seed, sequence_length, begun)


def state_document(
    state: TrainState,
    loss: float,
    healthy: bool,
    data: DataIdentity,
    model: ModelConfig,
    layout: dict[str, object],
    objective: Objective = "causal",
    freeze: Sequence[str] = (),
    average: Averaged | None = None,
    z_loss: float = 0.0,
) -> dict[str, object]:
    """What state.json holds: the above, whether the run was going well, the training loss of the step, the layout."""
    extra: dict[str, object] = {"freeze": list(freeze)} if freeze else {}
    if average is not None:
        extra["average"] = {key: value for key, value in asdict(average).items() if value}
    extra |= {"z_loss": z_loss} if z_loss else {}
    mixture = set[str]() if data.mixture else {"stages", "mixture"}
    ignored = {"block"} if model.qk_norm else {"block", "qk_norm"}  # what is trained is a Llama
    return {
        "state": _without(asdict(state), mixture),
        "loss": loss if math.isfinite(loss) else None,  # JSON knows no NaN
        "healthy": healthy,
        "data": _without(asdict(data), mixture),
        "model": _without(model.model_dump(mode="json"), ignored),
        "objective": objective,
        "layout": layout,
        **extra,
    }


def _without(fields: dict[str, object], names: Collection[str]) -> dict[str, object]:
    return {name: value for name, value in fields.items() if name not in names}


def read_saved(path: Path) -> Saved:
    """What the state.json of a checkpoint says. TornCheckpointError if it cannot be so.

    UserError for a format that this version does not know.
    """
    step = read_manifest(path).step
    try:
        saved = Saved.model_validate_json(read_regular(path / STATE, LARGEST_STATE, follow=False), strict=True)
    except OSError as error:
        raise TornCheckpointError(f"{STATE} cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise malformed(STATE, error) from None
    try:
        check_trained(saved.model)
    except UserError as error:
        raise TornCheckpointError(f"{STATE} names no Llama: {error}") from None
    state = saved.state
    if state.step != step:
        raise TornCheckpointError(f"{STATE} says step {state.step}, and the manifest {step}")
    if state.updates > state.step:
        raise TornCheckpointError(f"{STATE} says {state.updates} updates in {state.step} steps")
    if state.skipped > state.step - state.updates or state.skipped_samples > state.samples:
        raise TornCheckpointError(f"{STATE} says that the last {state.skipped} of {state.step} steps were skipped")
    if list(united(state.passed_over)) != list(state.passed_over) or any(a >= b for a, b in state.passed_over):
        raise TornCheckpointError(f"{STATE} says that samples were passed over in ranges that are not in order")
    if place(state.samples, state.passed_over) >= LARGEST:
        raise TornCheckpointError(f"{STATE} says that more samples were passed over than there can be")
    if len(state.losses) != len(state.norms):
        raise TornCheckpointError(f"{STATE} has {len(state.losses)} losses and {len(state.norms)} norms")
    average = saved.average
    if average is not None and (average.kind == "latest") != bool(average.steps):
        raise TornCheckpointError(f"{STATE} has an average of kind {average.kind} of {len(average.steps)} steps")
    tokens = state.samples * (saved.data.sequence_length or 1)  # a run that went on by longer sequences has fewer
    if tokens < state.step or state.samples > state.step * _LARGEST_BATCH:
        raise TornCheckpointError(f"{STATE} says {state.samples} sequences in {state.step} steps")
    return saved


def check_causal(path: Path, saved: Saved) -> None:
    """UserError where the checkpoint `path`, which says `saved`, is of a model that cannot continue text."""
    if saved.objective != "causal":
        raise UserError(
            f"{path} was trained with train.objective={saved.objective}: it fills in masked tokens and continues no "
            "text; use a checkpoint of a run with train.objective=causal"
        )


def name_of_weight(path: Path, saved: Saved, *, average: bool) -> Callable[[str], str]:
    """Under which name the checkpoint `path`, which says `saved`, has a weight, or its `average`.

    A frozen weight is its own average. UserError where there is none.
    """
    if not average:
        return lambda weight: weight
    if saved.average is None:
        raise UserError(
            f"{path} holds no average of the weights; leave out --average, or train with train.average.kind=exponential"
        )
    frozen = saved.frozen
    return lambda weight: weight if weight in frozen else average_name(weight)


def seen_before(config: RunConfig) -> Seen:
    """How far the run is that a start continues, as its newest checkpoint says: enough to check its length."""
    return NOTHING_SEEN if config.checkpoint.resume == "never" else newest_seen(config)


def newest_seen(config: RunConfig) -> Seen:
    """How far the newest whole checkpoint of the run is that says so in legal numbers; nothing without one."""
    for path in complete_checkpoints(Path(config.run.dir) / "checkpoints"):
        try:
            return read_saved(path).state_at(config.data.sequence_length).seen
        except TornCheckpointError:
            continue
    return NOTHING_SEEN
