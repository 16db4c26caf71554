"""Which sample comes at which step, from which source and document, and on which rank: the order of a run, printed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megallama.config.schema import RunConfig
from megallama.data.mixture import Mixture
from megallama.errors import UserError
from megallama.layout.budget import NOTHING_SEEN, Seen, batch_at, place, samples_at_step, total_steps


@dataclass(frozen=True)
class Traced:
    """One sample of a run."""

    step: int
    """Counted from 1, as in metrics."""
    sample: int
    """Counted from 0 in the order of the data; some may be passed over."""
    source: str
    epoch: int
    """Counted from 0."""
    window: int | None
    """The window of the source's training split; None where a sample is a document."""
    document: int
    """The document of the dataset that it begins in."""
    rank: int | None
    """The data-parallel rank that reads it, and in which of its micro-batches of the step; None where none is asked."""
    micro_batch: int | None


def parse_steps(text: str) -> tuple[int, int]:
    """`A:B` or `A`, counted from 1, B included. UserError for anything else."""
    first, colon, last = text.partition(":")
    try:
        found = int(first), int(last if colon else first)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise UserError(f"--steps {text} is no range of steps; write --steps 1:10 for the first ten")
    return found


def trace(
    config: RunConfig, mixture: Mixture, steps: tuple[int, int], dp_size: int | None = None, seen: Seen = NOTHING_SEEN
) -> Iterator[Traced]:
    """The samples of those steps in order, of a run that is as far as `seen`; with a `dp_size` also who reads them.

    UserError for steps that the run does not have, or a batch that so many ranks cannot share.
    """
    micro_batch_size, last = config.train.micro_batch_size, total_steps(config, seen)
    if steps[1] > last:
        raise UserError(f"--steps {steps[0]}:{steps[1]} goes beyond the run; its last step is {last}")
    if steps[0] <= seen.step and seen.samples != samples_at_step(config, seen.step):
        raise UserError(
            f"the first {seen.step} steps of the run read {seen.samples} sequences, not the "
            f"{samples_at_step(config, seen.step)} of this config; use --steps {seen.step + 1} or later, or the config "
            "of that time with checkpoint.resume=never"
        )
    for step in range(steps[0], steps[1] + 1):
        begin = samples_at_step(config, step - 1, seen if step > seen.step else NOTHING_SEEN)
        batch = batch_at(config, begin)
        if dp_size is not None and batch % (micro_batch_size * dp_size):
            raise UserError(
                f"a batch of {batch} sequences is no multiple of train.micro_batch_size={micro_batch_size} * --dp "
                f"{dp_size}; give the dp of the run"
            )
        for sample in range(begin, begin + batch):
            number = place(sample, seen.passed_over)
            source, found = mixture.trace(number)
            # The order of sampler.micro_batch_indices.
            micro, rank = divmod((sample - begin) // micro_batch_size, dp_size) if dp_size else (None, None)
            window = found.unit if config.data.pack == "all" else None
            yield Traced(step, number, source, found.epoch, window, found.document, rank, micro)
