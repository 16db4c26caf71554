"""What a run says while it runs, to metrics.jsonl, the terminal and trackers. Rank 0 speaks for all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megallama.config.schema import RunConfig
from megallama.run_dir.events import METRICS, JsonLines, Sink, event_now
from megallama.run_dir.terminal import open_terminal
from megallama.run_dir.trackers import open_trackers


class Metrics:
    """Sends events to every sink; made without sinks on all ranks but the first. `restarts`: starts before this one."""

    def __init__(self, sinks: Sequence[Sink], restarts: int = 0) -> None:
        self._sinks, self.restarts = sinks, restarts

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for sink in self._sinks:
            sink.close()

    def write(self, event: str, **values: Any) -> None:
        """Send an event of now."""
        made = event_now(event, **values)
        for sink in self._sinks:
            sink.write(made)

    def leave(self) -> None:
        """Leave the terminal as text that stays, for a process that is about to end at once; from any thread."""
        for sink in self._sinks:
            sink.leave()


def open_metrics(config: RunConfig, run_dir: Path) -> Metrics:
    """All sinks of the run."""
    lines = JsonLines(run_dir / METRICS)
    terminal = open_terminal(config.checkpoint.every)
    return Metrics([lines, terminal, *open_trackers(config, run_dir, lines.found)], lines.starts)


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
