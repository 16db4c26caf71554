"""A process of its own for each contender: peaks of memory are its own, and one that fails leaves the others alone."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from contenders.steps import Step

from megallama.config.schema import RunConfig
from megallama.hardware.measure import peak_memory_bytes
from megallama.parallel.launch import Launch

Build = Callable[[str, RunConfig, torch.device], Step]
"""Makes the step of the contender of a name; a function of a module, which crosses processes."""


class ContenderError(Exception):
    """Why a contender cannot take part, in one line."""


@dataclass(frozen=True)
class Round:
    """What a contender did in one round, over its timed steps."""

    seconds: list[float]
    """Of each step."""
    processor_seconds: float
    """Of all timed steps, over all threads: what other programs leave alone, if this one has a single thread."""
    losses: list[float]
    """Before each step."""
    peak_memory_bytes: int
    """During timed steps: allocated on the device, or resident in the process on a CPU."""


class Worker:
    """A contender in a process of its own, which computes only while `run` waits for it."""

    def __init__(self, build: Build, name: str, config: RunConfig, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, name, config, device), daemon=True)
        self._process.start()
        theirs.close()
        before = self._receive()
        assert isinstance(before, int)
        self.memory_before_bytes = before

    def run(self, warmup: int, steps: int) -> Round:
        """Train `warmup` steps untimed, then `steps` timed ones."""
        self._connection.send((warmup, steps))
        result = self._receive()
        assert isinstance(result, Round)
        return result

    def stop(self) -> None:
        """End the process and free what it holds."""
        self._connection.close()
        self._process.join(timeout=10)
        self._process.kill()
        self._process.join()

    def _receive(self) -> Round | int:
        try:
            answer: Round | int | str = self._connection.recv()
        except EOFError:
            self._process.join()
            raise ContenderError(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise ContenderError(answer)
        return answer


def _serve(connection: Connection, build: Build, name: str, config: RunConfig, device: torch.device) -> None:
    """Build the contender, then run rounds until the other end closes."""
    os.dup2(2, 1)  # what libraries print must not mix with the report
    Launch().prepare(device)
    try:
        before = resident_bytes("VmRSS") if device.type == "cpu" else 0
        step = build(name, config, device)
        connection.send(before)
        while True:
            warmup, steps = connection.recv()
            connection.send(_round(step, warmup, steps, device))
    except EOFError:
        pass
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        connection.send(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _round(step: Step, warmup: int, steps: int, device: torch.device) -> Round:
    for _ in range(warmup):
        step()
    began = time.process_time()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        losses, seconds = _time_on_cuda(step, steps)
        peak = peak_memory_bytes(device)
    else:
        forget_peak()
        losses, seconds = _time_on_cpu(step, steps)
        peak = resident_bytes("VmHWM")
    spent = time.process_time() - began
    return Round(seconds, spent, [float(loss) for loss in losses], peak)


def _time_on_cuda(step: Step, steps: int) -> tuple[list[torch.Tensor], list[float]]:
    """By events, so that the host may run ahead as far as the contender lets it; one wait at the end."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    losses = []
    marks[0].record()
    for mark in marks[1:]:
        losses.append(step())
        mark.record()
    torch.cuda.synchronize()
    return losses, [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(marks)]


def _time_on_cpu(step: Step, steps: int) -> tuple[list[torch.Tensor], list[float]]:
    losses, marks = [], [time.perf_counter()]
    for _ in range(steps):
        losses.append(step())
        marks.append(time.perf_counter())
    return losses, [end - begin for begin, end in pairwise(marks)]


def resident_bytes(which: str) -> int:
    """Of this process, now (VmRSS), or the most since `forget_peak` (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Let the most that this process held be what it holds now: a compiler held more than the steps do."""
    Path("/proc/self/clear_refs").write_text("5")
