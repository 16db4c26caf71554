"""What a run says while it runs: metrics.jsonl, the terminal, Weights & Biases. Rank 0 speaks for all."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol

from megallama.config.schema import RunConfig
from megallama.errors import UserError, printable
from megallama.run_dir.events import METRICS, Event, JsonLines

WANDB_ID = "wandb_id"
"""In the run directory: what Weights & Biases knows the run by."""
_UPLOAD_SECONDS = 120.0
"""The time the end of a run waits for a network; what is not sent by then stays in the run directory."""


class Sink(Protocol):
    """Where events go."""

    def write(self, event: Event) -> None: ...
    def close(self) -> None: ...


class Terminal:
    """A live line on a terminal, a plain line for each event elsewhere."""

    def __init__(self) -> None:
        self._live, self._shown = sys.stdout.isatty(), 0

    def write(self, event: Event) -> None:
        line = _line(event)
        if line is None:
            return
        line = printable(line)  # names of files are in it
        passing = self._live and event["event"] == "train"
        padding = " " * max(0, self._shown - len(line))
        with suppress(OSError):  # a log on a full disk, or nobody who reads any more: no reason to end the run
            sys.stdout.write(("\r" if self._shown else "") + line + padding + ("" if passing else "\n"))
            sys.stdout.flush()
        self._shown = len(line) if passing else 0

    def close(self) -> None:
        try:
            sys.stdout.write("\n" if self._shown else "")
            sys.stdout.flush()
        except OSError:  # Python would end with code 120 for what it cannot write when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class WandbSink:
    """Weights & Biases, of which all starts of a run are one run; mode offline needs neither network nor account.

    Weights & Biases counts rows, which never go back, and drops one that does. A step that is done again after a return
    is another row of the same `step`. `row` is the first that no start before has written. What fails there is said,
    and ends nothing.
    """

    def __init__(self, config: RunConfig, run_dir: Path, row: int) -> None:
        assert config.logging.wandb is not None
        self._row = row
        self._run = _wandb_run(config, run_dir, config.logging.wandb.mode)

    def write(self, event: Event) -> None:
        if "step" not in event or self._run is None:
            return
        prefix = event["event"] if event["event"] != "eval" else f"eval/{event['split']}"
        values = [(key, value) for key, value in event.items() if not isinstance(value, dict)]
        for key, inner in event.items():
            values += [(f"{key}/{name}", value) for name, value in inner.items()] if isinstance(inner, dict) else []
        numbers = {f"{prefix}/{key}": value for key, value in values if isinstance(value, int | float)}
        try:
            self._run.log({"step": event["step"], **numbers}, step=self._row)
        except Exception as error:
            _say_lost(error, "the run goes on without")
            self._run = None
        self._row += 1

    def close(self) -> None:
        try:
            if self._run is not None:
                self._run.finish()
        except Exception as error:
            _say_lost(error, "`wandb sync` sends what it did not get")


def _wandb_run(config: RunConfig, run_dir: Path, mode: Literal["online", "offline"]) -> Any:
    """The run of wandb that the run in `run_dir` is, offline where there is no network; None if it cannot be had."""
    import wandb  # a second of import that runs without it need not pay

    assert config.logging.wandb is not None
    wanted = config.logging.wandb
    try:
        run = wandb.init(
            project=wanted.project,
            name=wanted.name or run_dir.name,
            id=_wandb_id(run_dir),
            resume="allow",
            mode=mode,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(finish_timeout=_UPLOAD_SECONDS),
        )
        run.define_metric("*", step_metric="step")
    except Exception as error:
        if mode == "offline":
            _say_lost(error, "the run goes on without")
            return None
        _say_lost(error, "what it would get is written offline, for `wandb sync`")
        wandb.teardown()  # its process holds the id
        return _wandb_run(config, run_dir, "offline")
    return run


def _wandb_id(run_dir: Path) -> str:
    """The id of the run in `run_dir`, made by its first start."""
    path = run_dir / WANDB_ID
    found = path.read_text() if path.exists() else ""
    if not found:
        found = secrets.token_hex(4)
        path.write_text(found)
    return found


def _say_lost(error: Exception, instead: str) -> None:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    with suppress(OSError):
        print(f"megallama: Weights & Biases is not reached ({reason}); {instead}", file=sys.stderr)


class Metrics:
    """Sends events to every sink; made without sinks on all ranks but the first."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for sink in self._sinks:
            sink.close()

    def write(self, event: str, **values: Any) -> None:
        for sink in self._sinks:
            sink.write({"event": event, **values})


def check_sinks(config: RunConfig) -> None:
    """UserError if Weights & Biases is asked for online and knows no account; waits for no one at a prompt."""
    wanted = config.logging.wandb
    if wanted is None or wanted.mode == "offline":
        return
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UserError(
            "logging.wandb.mode=online, but Weights & Biases has no key here; set WANDB_API_KEY, run `wandb login`, "
            "or use logging.wandb.mode=offline"
        )


def open_metrics(config: RunConfig, run_dir: Path) -> Metrics:
    """All sinks of the run."""
    lines = JsonLines(run_dir / METRICS)
    sinks: list[Sink] = [lines, Terminal()]
    if config.logging.wandb is not None:
        sinks.append(WandbSink(config, run_dir, lines.found))
    return Metrics(sinks)


def _line(event: Event) -> str | None:
    writer: Callable[[Event], str] | None = _LINES.get(event["event"])
    return writer(event) if writer else None


def _train_line(e: Event) -> str:
    total = e["total_steps"]
    return (
        f"step {e['step']:>{len(str(total))}}/{total}  loss {e['loss']:.4f}  norm {e['grad_norm']:.3f}  "
        f"lr {e['lr']:.2e}  {e['tokens_per_second']:,.0f} tok/s  mfu {e['mfu']:.1%}  "
        f"mem {e['peak_memory_bytes'] / 2**30:.2f} GiB  eta {_duration(e['seconds_left'])}"
    )


def _forecast_line(e: Event) -> str:
    said = []
    if "predicted_seconds" in e:
        predicted, measured = e["predicted_seconds"], e["seconds"]
        said.append(f"{measured:.4g} s a step, predicted {_beside(predicted, measured, '.4g', 's')}")
    if "predicted_memory_bytes" in e:
        predicted, measured = e["predicted_memory_bytes"] / 2**30, e["peak_memory_bytes"] / 2**30
        said.append(f"mem {measured:.2f} GiB, predicted {_beside(predicted, measured, '.2f', 'GiB')}")
    return f"step {e['step']}  {'  '.join(said)}"


def _beside(predicted: float, measured: float, digits: str, unit: str) -> str:
    return f"{predicted:{digits}} {unit} ({predicted / measured - 1:+.1%})"


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}"


_SKIPPED = {
    "nonfinite": "gradient not finite",
    "loss": "loss far above the last ones",
    "gradient": "gradient norm far above the last ones",
}

_LINES: dict[str, Callable[[Event], str]] = {
    "train": _train_line,
    "eval": lambda e: f"step {e['step']}  {e['split']} loss {e['loss']:.4f}  perplexity {e['perplexity']:.2f}",
    "forecast": _forecast_line,
    "checkpoint": lambda e: (
        f"step {e['step']}  saved {e['path']} in {e['seconds']:.1f} s, {e['blocked_seconds']:.2f} s of them waited for"
    ),
    "checkpoint_failed": lambda e: f"step {e['step']}  could not be saved, going on: {e['reason']}",
    "notice": lambda e: e["text"],
    "resume": lambda e: f"step {e['step']}  continues {e['path']}",
    "rollback": lambda e: f"step {e['step']}  went back to {e['path']}",
    "rewind": lambda e: (
        f"step {e['step']}  went back to {e['path']}; the samples from {e['passed_over'][0]} up to "
        f"{e['passed_over'][1]} of the data are passed over"
    ),
    "skip": lambda e: f"step {e['step']}  {_SKIPPED[e['reason']]}: update skipped on every rank",
    "stop": lambda e: (
        f"step {e['step']}  {e['reason']}{'; the same command continues' if e['status'] == 'requeue' else ''}"
    ),
}


def environment(**facts: Any) -> dict[str, Any]:
    """Versions and hardware, for environment.json; no variable of the environment, which may hold secrets."""
    import platform
    from importlib.metadata import version

    packages = ("megallama", "torch", "deepspeed", "numpy", "tiktoken")
    return {
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpus": os.cpu_count(),
        **{package: version(package) for package in packages},
        **facts,
    }
