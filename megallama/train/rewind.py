"""Steps without an update: recorded, and after too many in a row undone, without their samples (PaLM, arXiv 2204.02311,
section 5.1: back to a checkpoint before the spike, and on with other data)."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import replace
from pathlib import Path
from typing import Literal

from megallama.checkpoint.format import step_of
from megallama.checkpoint.health import healthy_checkpoints
from megallama.checkpoint.reading.rollback import return_to
from megallama.checkpoint.reading.store import damage
from megallama.checkpoint.state import TrainState, read_saved
from megallama.errors import SharedError, UserError
from megallama.layout.budget import united
from megallama.layout.check import check_batching
from megallama.layout.frozen import frozen_weights
from megallama.parallel.plain import from_first
from megallama.train.run import Run
from megallama.train.saves import continued, report_saves
from megallama.train.spikes import REASONS, Reason
from megallama.train.step import Step

Skipped = Literal["nonfinite"] | Reason
SAID: dict[Skipped, str] = {
    "nonfinite": "a gradient that is not finite",
    "loss": "a loss far above the last ones",
    "gradient": "a gradient norm far above the last ones",
}


def reason_of(step: Step) -> Skipped:
    """Why the step, which was not applied, was skipped."""
    stood_out = [reason for reason, said in zip(REASONS, step.vetoed, strict=False) if said]
    return stood_out[0] if stood_out else "nonfinite"


def write_skip(run: Run, state: TrainState, batch: int, step: Step) -> None:
    """Record that `step`, of `batch` sequences up to `state`, was skipped."""
    first, end = places(run, state, batch)
    run.metrics.write(
        "skip",
        step=state.step,
        samples=state.samples,
        reason=reason_of(step),
        loss=step.loss,
        grad_norm=step.grad_norm,
        of_data=[first, end],
    )


def places(run: Run, state: TrainState, samples: int) -> tuple[int, int]:
    """[first, end) in the order of the data of the last `samples` samples of the run."""
    place = run.data.train.place
    return place(state.samples - samples), place(state.samples - 1) + 1


def begins_anew(run: Run, state: TrainState, batch: int) -> bool:
    """Whether the next step, of `batch` sequences, has another batch than the last, or another stage of a mixture.

    Its loss and norm have another level then.
    """
    last, now = (run.data.train.place(max(0, sample)) for sample in (state.samples - state.last_batch, state.samples))
    return batch != state.last_batch or bisect_right(state.stages, last) != bisect_right(state.stages, now)


def rewound(run: Run, state: TrainState) -> tuple[Run, TrainState] | None:
    """Where the run goes on after going back before its skipped steps, whose samples it passes over from now on.

    None where it has gone back often enough, or there is no healthy checkpoint to go back to. Every rank must call it.
    """
    if state.rewinds >= run.config.health.max_rewinds:
        return None
    run.watchdog.now("rewind", patient=True)
    run.requests.no_step()
    run.saver.wait()
    report_saves(run)
    path = checkpoint_before(run, state.step - state.skipped)
    if path is None:
        return None
    undone = undo_newer(run, path)
    out = places(run, state, state.skipped_samples)
    back = replace(
        continued(run, path),
        rewinds=state.rewinds + 1,
        passed_over=united([*state.passed_over, out]),
    )
    facts = {"samples": back.samples, "path": str(path), "passed_over": list(out), "set_aside": undone}
    run.metrics.write("rewind", step=back.step, **facts)
    return replace(run, data=run.data.begun_at(back.stages, back.passed_over)), back


def undo_newer(run: Run, path: Path) -> dict[str, str]:
    """Set newer checkpoints than `path` aside, on rank 0; UserError on all ranks where it cannot."""
    said: dict[str, dict[str, str]] = {}
    if run.mesh.rank == 0:
        try:
            said = {"undone": return_to(path).set_aside}
        except OSError as error:
            why = f"{error.filename} cannot be renamed ({error.strerror}); see who owns {path.parent}"
            said = {"refusal": {"": why}}
    said = from_first(said, run.mesh.world.group, run.mesh.device)
    if "refusal" in said:
        raise SharedError(said["refusal"][""])
    return said["undone"]


def checkpoint_before(run: Run, step: int) -> Path | None:
    """The newest healthy and sound checkpoint from before `step` that the run can go on from; alike on all ranks.

    That of `step` itself may be of the update that has ruined them. It trained the same weights, and its batch, of an
    earlier stage of `train.batch_ramp`, goes with the ranks of now.
    """
    mesh, frozen = run.mesh, frozen_weights(run.config.model, run.config.train.freeze)
    found = [str(path) for path in healthy_checkpoints(run.dir / "checkpoints") if step_of(path) < step]
    for path in map(Path, from_first(found, mesh.world.group, mesh.device)):
        # Moments of what was frozen then are not in it.
        if not damage(path, mesh) and read_saved(path).frozen == frozen and _goes_with_ranks(run, path):
            return path
    return None


def _goes_with_ranks(run: Run, path: Path) -> bool:
    try:
        check_batching(run.config, run.mesh.world.size, read_saved(path).state_at(run.config.data.sequence_length).seen)
    except UserError:
        return False
    return True
