"""What a run says while it runs: metrics.jsonl, the terminal, Weights & Biases. Rank 0 speaks for all."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megallama.config.schema import RunConfig
from megallama.errors import UserError

Event = dict[str, Any]


class Sink(Protocol):
    """Where events go."""

    def write(self, event: Event) -> None: ...
    def close(self) -> None: ...


class JsonLines:
    """One object per line, at full precision, flushed line by line so that a killed run loses none."""

    def __init__(self, path: Path) -> None:
        content = path.read_bytes() if path.exists() else b""
        if content and not content.endswith(b"\n"):  # a start that was killed in the middle of a line
            os.truncate(path, content.rfind(b"\n") + 1)
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()

    def write(self, event: Event) -> None:
        # JSON knows no infinity: a number that is not finite is null.
        legal = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in event.items()}
        self._waiting += (json.dumps(legal) + "\n").encode()
        self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        """A full disk ends no run: the lines wait in memory until there is room."""
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            with suppress(OSError):  # what is said may go to that disk as well
                print(f"megallama: metrics cannot be written ({error.strerror})", file=sys.stderr)


class Terminal:
    """A live line on a terminal, a plain line for each event elsewhere."""

    def __init__(self, total_steps: int) -> None:
        self._total, self._live, self._shown = total_steps, sys.stdout.isatty(), 0

    def write(self, event: Event) -> None:
        line = _line(event, self._total)
        if line is None:
            return
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
    """Weights & Biases; mode offline needs neither network nor account."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        import wandb  # a second of import that runs without it need not pay

        assert config.logging.wandb is not None
        settings = config.logging.wandb
        self._run = wandb.init(
            project=settings.project,
            name=settings.name or run_dir.name,
            mode=settings.mode,
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
        )

    def write(self, event: Event) -> None:
        if "step" not in event:
            return
        prefix = event["event"] if event["event"] != "eval" else f"eval/{event['split']}"
        numbers = {f"{prefix}/{key}": value for key, value in event.items() if isinstance(value, int | float)}
        self._run.log(numbers, step=event["step"])

    def close(self) -> None:
        self._run.finish()


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


def open_metrics(config: RunConfig, run_dir: Path, total_steps: int) -> Metrics:
    """All sinks of the run."""
    sinks: list[Sink] = [JsonLines(run_dir / "metrics.jsonl"), Terminal(total_steps)]
    if config.logging.wandb is not None:
        sinks.append(WandbSink(config, run_dir))
    return Metrics(sinks)


def _line(event: Event, total: int) -> str | None:
    writer: Callable[[Event, int], str] | None = _LINES.get(event["event"])
    return writer(event, total) if writer else None


def _train_line(e: Event, total: int) -> str:
    left = (total - e["step"]) * e["seconds"]
    return (
        f"step {e['step']:>{len(str(total))}}/{total}  loss {e['loss']:.4f}  norm {e['grad_norm']:.3f}  "
        f"lr {e['lr']:.2e}  {e['tokens_per_second']:,.0f} tok/s  mfu {e['mfu']:.1%}  "
        f"mem {e['peak_memory_bytes'] / 2**30:.2f} GiB  eta {_duration(left)}"
    )


def _forecast_line(e: Event, _: int) -> str:
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


_LINES: dict[str, Callable[[Event, int], str]] = {
    "train": _train_line,
    "eval": lambda e, _: f"step {e['step']}  {e['split']} loss {e['loss']:.4f}  perplexity {e['perplexity']:.2f}",
    "forecast": _forecast_line,
    "checkpoint": lambda e, _: (
        f"step {e['step']}  saved {e['path']} in {e['seconds']:.1f} s, {e['blocked_seconds']:.2f} s of them waited for"
    ),
    "checkpoint_failed": lambda e, _: f"step {e['step']}  could not be saved, going on: {e['reason']}",
    "notice": lambda e, _: e["text"],
    "resume": lambda e, _: f"step {e['step']}  continues {e['path']}",
    "skip": lambda e, _: f"step {e['step']}  gradient not finite: update skipped on every rank",
    "stop": lambda e, _: (
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
