"""One page on why a run gave up: which steps were skipped, what they read, and where numbers stop being finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch

from megallama.checkpoint.state import TrainState
from megallama.config.schema import IGNORE_INDEX
from megallama.data.loader import MicroBatch
from megallama.data.mixture import Mixture
from megallama.data.source import Windows
from megallama.errors import printable
from megallama.run_dir.events import Event, standing_events
from megallama.train.layer_norms import LayerNorms, layer_norms
from megallama.train.rewind import SAID, places
from megallama.train.run import Run

DIAGNOSIS = "diagnosis.txt"
"""In the run directory."""
_STEPS, _SAMPLES, _CHARACTERS = 20, 8, 200


def diagnose(run: Run, state: TrainState, batches: Sequence[MicroBatch]) -> Path:
    """Write what is known of the skipped steps up to `state`, the last of which read `batches`; returns the file.

    Every rank must call it: the batches go through the model once more, and their gradients are left where they fall.
    """
    copies = torch.full((), float(run.mesh.data.size), device=run.mesh.device)  # a step's scale has them as well
    with layer_norms(run) as norms:
        run.engine.forward_backward(batches, copies)
    path = run.dir / DIAGNOSIS
    if run.mesh.rank == 0:
        try:
            path.write_text("\n\n".join(_page(run, state, norms)) + "\n")
        except Exception as error:  # the page must not be why a run ends: other ranks wait for this one
            run.metrics.write("notice", text=f"{path} cannot be written ({type(error).__name__}: {error})")
    return path


def _page(run: Run, state: TrainState, norms: LayerNorms) -> list[str]:
    skips = [event for event in standing_events(run.dir) if event["event"] == "skip"][-state.skipped :]
    first = state.step - state.skipped + 1
    rewinds = f" after going back {state.rewinds} times" if state.rewinds else ""
    return [
        f"Steps {first} to {state.step} were skipped{rewinds}.",
        _steps(run, skips),
        where_not_finite(norms),
        _samples(run, state),
    ]


def _steps(run: Run, skips: Sequence[Event]) -> str:
    rows = [
        f"step {skip['step']}: {SAID[skip['reason']]}; loss {_number(skip['loss'])}, "
        f"gradient norm {_number(skip['grad_norm'])}"
        for skip in skips[:_STEPS]
    ]
    if run.spikes is not None:
        loss, norm = run.spikes.bounds.tolist()
        rows.append(
            f"A loss above {_number(loss)} or a norm above {_number(norm)} is skipped (health.spike_deviations)."
        )
    return "\n".join(rows)


def where_not_finite(norms: LayerNorms) -> str:
    """Which layer's output is the first that is not finite, or whose gradient, and the norms of all."""
    bad = [layer for layer, rms in enumerate(norms.activation_rms) if not math.isfinite(rms)]
    worse = [layer for layer, norm in enumerate(norms.gradient_norm) if not math.isfinite(norm)]
    if bad:
        said = f"the output of layer {bad[0]} is the first that is not finite."
    elif worse:
        said = f"the gradient at the output of layer {worse[-1]} is the first that is not finite."
    else:
        said = "the output of every layer and the gradient there are finite."
    table = enumerate(zip(norms.activation_rms, norms.gradient_norm, strict=True))
    return "\n".join(
        [
            f"In a forward and a backward of the last step, {said}",
            "By layer, the root mean square of the output and the norm of the gradient of the summed loss there:",
            *(f"layer {layer}: {_number(rms)}, {_number(norm)}" for layer, (rms, norm) in table),
        ]
    )


def _samples(run: Run, state: TrainState) -> str:
    """The samples of the first skipped step as text."""
    first, end = places(run, state, state.skipped_samples)
    rows = [f"These steps read the samples from {first} up to {end} in the order of the data. The first of them:"]
    for number in range(first, min(end, first + _SAMPLES)):
        ids = [int(token) for token in run.data.train.source.sample(number) if token != IGNORE_INDEX]
        text = printable(run.data.tokenizer.decode(ids[: 2 * _CHARACTERS])[:_CHARACTERS])
        rows.append(f"sample {number}, {_where(run, number)}: {text}")
    return "\n".join(rows)


def _where(run: Run, number: int) -> str:
    source = run.data.train.source
    if isinstance(source, Mixture):
        name, found = source.trace(number)
        return f"document {found.document} of {printable(name)}"
    assert isinstance(source, Windows)
    return f"document {source.trace(number).document}"


def _number(value: float | None) -> str:
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"
