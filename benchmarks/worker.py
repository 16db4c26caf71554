"""A process of its own for each contender: peaks of memory are its own, and one that fails leaves the others alone."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection

import torch
from contenders import Step, build

from megallama.config.schema import RunConfig
from megallama.hardware.measure import peak_memory_bytes
from megallama.parallel.launch import Launch


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
    """So far: allocated on the device, or resident in the process on a CPU."""


class Worker:
    """A contender in a process of its own, which computes only while `run` waits for it."""

    def __init__(self, name: str, config: RunConfig, device: torch.device) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, config, device), daemon=True)
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


def _serve(connection: Connection, name: str, config: RunConfig, device: torch.device) -> None:
    """Build the contender, then run rounds until the other end closes."""
    os.dup2(2, 1)  # what libraries print must not mix with the report
    Launch().prepare(device)
    try:
        before = _resident_bytes() if device.type == "cpu" else 0
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
    else:
        losses, seconds = _time_on_cpu(step, steps)
    spent = time.process_time() - began
    return Round(seconds, spent, [float(loss) for loss in losses], peak_memory_bytes(device))


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


def _resident_bytes() -> int:
    """Now, in this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
