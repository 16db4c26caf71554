"""What a run will read of each of its sources, before it reads any; no torch."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction

from megallama.config.schema import RunConfig
from megallama.data.mixture import Mixture, sources_of
from megallama.layout.budget import NOTHING_SEEN, Seen, run_samples, samples_at_step, total_steps

MOST_EPOCHS = 4
"""Up to so many epochs, repeated data are almost as good as new ones (Muennighoff et al., arXiv 2305.16264)."""


@dataclass(frozen=True)
class SourcePlan:
    """What a run reads of one source."""

    name: str
    path: str
    tokens: int
    """Of its documents that are for training."""
    samples: int
    """Those of an epoch."""
    read_samples: int
    read_tokens: int
    share: float
    """What part of all samples of the run it has."""
    epochs: float
    limit: float | None
    """Epochs that it may come to."""
    repeats_at_step: int | None
    """The first step that reads a sample of it again."""
    left_out_tokens: int
    """Those that no sample of an epoch holds: behind the last window, or beyond the length of a sample."""
    cut_documents: int
    """Of which there are such tokens."""
    verdict: str


@dataclass(frozen=True)
class StagePlan:
    """What part of the samples each source has from a step on, exactly."""

    from_step: int
    first_sample: int
    shares: dict[str, str]
    """As fractions."""


@dataclass(frozen=True)
class DataPlan:
    """What a run reads."""

    steps: int
    samples: int
    tokens: int
    stages: list[StagePlan]
    sources: list[SourcePlan]

    @property
    def facts(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def plan_data(config: RunConfig, mixture: Mixture, seen: Seen = NOTHING_SEEN) -> DataPlan:
    """The plan of a run that is as far as `seen`, and reads `mixture`."""
    steps, samples, length = total_steps(config, seen), run_samples(config, seen), config.data.sequence_length
    limits = {name: source.epochs for name, source in sources_of(config.data).items()}
    read, sources = mixture.epochs(samples), list[SourcePlan]()
    opened = dict(zip(mixture.blend.names, zip(mixture.parts, mixture.repeats, strict=True), strict=True))
    for name in limits or mixture.blend.names:
        (part, repeat), (count, epochs) = opened[name], read[name]
        at_step = None if repeat is None or repeat >= samples else step_of(config, repeat, seen)
        left_out = part.left_out
        sources.append(
            SourcePlan(
                name,
                part.split.dataset.prefix,
                len(part.split.tokens),
                part.samples_per_epoch,
                count,
                count * length,
                count / samples,
                epochs,
                limits.get(name),
                at_step,
                left_out.tokens,
                left_out.documents,
                _verdict(epochs, limits.get(name)),
            )
        )
    stages = [
        StagePlan(step, stage.first_sample, {name: str(share) for name, share in stage.shares.items()})
        for step, stage in zip(mixture.steps, mixture.blend.stages, strict=True)
    ]
    return DataPlan(steps, samples, samples * length, stages, sources)


def step_of(config: RunConfig, sample: int, seen: Seen = NOTHING_SEEN) -> int:
    """The step that reads sample `sample`, counted from 1, as metrics count."""
    since = seen if sample >= seen.samples else NOTHING_SEEN
    steps = range(since.step, total_steps(config, seen))
    return since.step + bisect_right(steps, sample, key=lambda step: samples_at_step(config, step, since))


def _verdict(epochs: float, limit: float | None) -> str:
    if limit is not None and epochs > limit:
        return f"refused, over its limit of {limit:g} epochs"
    if epochs > MOST_EPOCHS:
        return f"over {MOST_EPOCHS} epochs, worth less"
    if epochs > 1:
        return "repeats, almost as good as new"
    return "all new"


def table(plan: DataPlan) -> Iterator[str]:
    """The plan as lines."""
    yield f"{plan.steps:,} steps, {plan.samples:,} samples, {plan.tokens:,} tokens"
    shares = [f"from step {stage.from_step:,}" for stage in plan.stages]
    rows = [["source", "tokens", *shares, "read", "of the run", "epochs", "repeats at step", "verdict"]]
    for source in plan.sources:
        rows.append(
            [
                source.name,
                f"{source.tokens:,}",
                *(_percent(stage.shares.get(source.name, "0")) for stage in plan.stages),
                f"{source.read_tokens:,}",
                f"{source.share:.4%}",
                f"{source.epochs:.3f}",
                "-" if source.repeats_at_step is None else f"{source.repeats_at_step:,}",
                source.verdict,
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells[1:-1], row[-1]])
    for source in plan.sources:
        if source.left_out_tokens * plan.samples >= plan.tokens:  # a sample or more
            cut = f"{source.left_out_tokens:,} tokens; documents cut: {source.cut_documents:,}"
            yield f"{source.name}: no sample of an epoch holds {cut}"


def _percent(share: str) -> str:
    return f"{float(100 * Fraction(share)):.6g}%"
