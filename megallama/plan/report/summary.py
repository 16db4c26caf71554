"""The first screen of a plan: whether a run fits, how long it takes and why, and what would help most. Pure."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.budget import planned_tokens
from megallama.layout.check import dp_size
from megallama.layout.counts import count_parameters
from megallama.layout.scaling_laws import optimal_tokens
from megallama.layout.schedules import schedule_of
from megallama.plan.hardware import Gpu
from megallama.plan.memory.ledger import rank_bytes
from megallama.plan.memory.state import GIB
from megallama.plan.report.table import Part, Row
from megallama.plan.report.time import check_type
from megallama.plan.search.changes import single_changes
from megallama.plan.sizing.cost import run_cost, speed
from megallama.plan.time.software import Machine, machine
from megallama.plan.time.step_time import StepTime, step_time

WIDTH = 80
LARGE_BUBBLE = 0.3
"""The share of a step."""
FAR_FROM_BEST = 0.5
"""The share of the speed that the best single change reaches."""
WORTH_NAMING = 0.99
"""A change that leaves more of the step's time is within what a prediction can tell."""
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"))


@dataclass(frozen=True)
class Summary:
    """What the first screen says, a label and its sentence each."""

    title: str
    lines: tuple[tuple[str, str], ...]
    warning: str = ""
    without_time: UserError | None = None
    """Why a GPU that was named has no step time."""

    def render(self) -> str:
        """At most 20 lines of at most 80 characters."""
        indent = 2 + max(len(label) for label, _ in self.lines)
        found = textwrap.wrap(self.title, WIDTH)
        for label, sentence in self.lines:
            together = sentence.replace(" %", "\0%").replace(" GiB", "\0GiB")  # a number and its unit
            wrapped = textwrap.wrap(together, WIDTH, initial_indent=f"{label:{indent}}", subsequent_indent=" " * indent)
            found += [line.replace("\0", " ") for line in wrapped]
        return "\n".join([*found, *textwrap.wrap(self.warning, WIDTH)])


@dataclass(frozen=True)
class _Measured:
    """A change with what it comes to."""

    key: str
    words: str
    instead_of: str
    size: int
    seconds: float | None
    fits: bool


def _measured(config: RunConfig, world_size: int, gpu: Gpu, on: Machine | None) -> list[_Measured]:
    found = []
    for one in single_changes(config, world_size, gpu):
        size = one.size
        fits = size <= gpu.usable_bytes
        found.append(_Measured(one.key, one.words, one.instead_of, size, one.seconds(on), fits))
    return found


def changes_part(config: RunConfig, world_size: int, on: Machine) -> Part:
    """Every single change of the layout that is legal, with the seconds of a step."""
    rows = [
        Row(one.words, one.words, f"now {one.instead_of}; {one.size / GIB:.2f} GiB", one.seconds, "s")
        for one in _measured(config, world_size, on.gpu, on)
        if one.seconds is not None
    ]
    return Part("changes", "Single changes of the layout, with the memory that they need", tuple(rows))


def summarise(
    config: RunConfig,
    world_size: int,
    gpu: Gpu | None,
    machine: Callable[[Gpu], Machine] = machine,
    tokens: float | None = None,
    price: float | None = None,
) -> Summary:
    """The first screen of a legal run; without a kind of GPU it has no time, and nothing to fit into.

    `machine` says what is assumed of the software on it; its UserError is why there is no time.
    """
    title = f"{_figure(count_parameters(config.model).total)} parameters on {world_size} x "
    length = _length(config, planned_tokens(config, tokens))
    if gpu is None:
        needed = f"{_memory(config, world_size)}; --gpu h100 says whether it fits, and how long it takes"
        return Summary(f"{title}GPU: {_layout(config, world_size)}", (("memory", needed), ("tokens", length), _MORE))
    lines = [("memory", _fit(config, world_size, gpu))] if gpu.memory_gib is not None else []
    on, step, warning, without_time = None, None, "", None
    try:
        check_type(config, gpu)
        on = machine(gpu)
        step = step_time(config, world_size, on)
    except UserError as reason:
        without_time = reason
    else:
        lines += _time(config, world_size, gpu, step, planned_tokens(config, tokens), price)
    lines.append(("tokens", length))
    if gpu.memory_gib is not None:
        beside = _measured(config, world_size, gpu, on)
        lines += _changes(config, world_size, gpu, step, beside)
        warning = _warning(step, [one for one in beside if one.fits])
    return Summary(f"{title}{gpu.name}: {_layout(config, world_size)}", (*lines, _MORE), warning, without_time)


_MORE = ("more", "--explain: the arithmetic; --search: other layouts; --json: everything")


def _layout(config: RunConfig, world_size: int) -> str:
    parallel, train = config.parallel, config.train
    words = [f"tp {parallel.tensor}", f"pp {parallel.pipeline}", f"dp {dp_size(config, world_size)}"]
    if parallel.pipeline > 1:
        chunks = "" if schedule_of(parallel).stages_per_rank else f" x{parallel.chunks}"
        words.append(f"{parallel.schedule}{chunks}")
    return ", ".join(
        [*words, f"ZeRO-{config.zero.stage}", f"micro-batch {train.micro_batch_size}", f"recompute {train.recompute}"]
    )


def _memory(config: RunConfig, world_size: int) -> str:
    sizes = rank_bytes(config, world_size)
    where = f" on pipeline rank {sizes.index(max(sizes))}" if len(sizes) > 1 else ""
    return f"{max(sizes) / GIB:.1f} GiB{where}"


def _fit(config: RunConfig, world_size: int, gpu: Gpu) -> str:
    usable = gpu.usable_bytes
    free = usable - max(rank_bytes(config, world_size))
    verdict = f"fits with {free / GIB:.1f} GiB left" if free >= 0 else f"does not fit by {-free / GIB:.1f} GiB"
    return f"{verdict}: {_memory(config, world_size)}, {usable / GIB:.1f} GiB usable"


def _time(
    config: RunConfig, world_size: int, gpu: Gpu, step: StepTime, tokens: float, price: float | None
) -> list[tuple[str, str]]:
    rate = speed(config, world_size, gpu, step.total)
    cost = run_cost(config.tokens_per_step, world_size, gpu, step.total, tokens, price)
    money = "" if cost.money is None else f", {_figure(cost.money)} at {price:g} per GPU-hour"
    parts = {
        "compute": step.compute,
        "tensor": step.tensor,
        "pipeline": step.pipeline,
        "bubble": step.bubble,
        "data": step.data,
        "optimizer": step.optimizer,
    }
    shares = [f"{name} {100 * seconds / step.total:.0f} %" for name, seconds in parts.items() if seconds]
    what = "at the MFU that --mfu assumes" if step.assumed else ", ".join(shares)
    return [
        ("time", f"{_duration(cost.hours)}, {_figure(cost.gpu_hours)} GPU-hours{money}"),
        ("speed", f"{_figure(rate.tokens_per_second)} tokens/s, MFU {100 * rate.mfu_full:.1f} %"),
        ("step", f"{_figure(step.total)} s: {what}"),
    ]


def _duration(hours: float) -> str:
    if hours >= 48:
        return f"{_figure(hours / 24)} days"
    return f"{_figure(hours)} hours" if hours >= 1 else f"{_figure(60 * hours)} minutes"


def _length(config: RunConfig, tokens: float) -> str:
    parameters = count_parameters(config.model).total
    best = optimal_tokens(parameters) / parameters
    return f"{_figure(tokens)}, {_figure(tokens / parameters)} per parameter, where {_figure(best)} is compute-optimal"


def _changes(
    config: RunConfig, world_size: int, gpu: Gpu, step: StepTime | None, beside: list[_Measured]
) -> list[tuple[str, str]]:
    """The two that help most, of two keys: towards fitting where the run does not, else towards speed."""
    now = max(rank_bytes(config, world_size))
    fitting = [one for one in beside if one.fits]
    if now > gpu.usable_bytes:
        chosen = sorted(fitting, key=lambda one: (one.seconds or 0.0, one.size)) or sorted(beside, key=lambda x: x.size)
        chosen = [one for one in chosen if one.size < now]
    elif step is not None:
        faster = [one for one in fitting if one.seconds is not None and one.seconds < WORTH_NAMING * step.total]
        chosen = sorted(faster, key=lambda one: one.seconds or 0.0)
    else:
        chosen = []
    lines = [f"{one.words} (now {one.instead_of}): {_effect(one, now, step)}" for one in _of_two_keys(chosen)]
    if not lines and ((step is not None and not step.assumed) or now > gpu.usable_bytes):
        lines = [f"none of {len(beside)} single changes of the layout helps"]
    return [("" if number else "better", line) for number, line in enumerate(lines)]


def _of_two_keys(chosen: Iterable[_Measured]) -> list[_Measured]:
    found: dict[str, _Measured] = {}
    for one in chosen:
        found.setdefault(one.key, one)
    return list(found.values())[:2]


def _effect(one: _Measured, now: int, step: StepTime | None) -> str:
    words = []
    if step is not None and one.seconds is not None:
        change = one.seconds / step.total - 1
        words.append(f"{abs(100 * change):.0f} % {'faster' if change < 0 else 'slower'}")
    if abs(one.size - now) > 0.05 * GIB:
        words.append(f"{'frees' if one.size < now else 'takes'} {abs(one.size - now) / GIB:.1f} GiB")
    return ", ".join([*words, "fits" if one.fits else "does not fit yet"])


def _warning(step: StepTime | None, fitting: list[_Measured]) -> str:
    if step is None or step.assumed:
        return ""
    if step.bubble > LARGE_BUBBLE * step.total:
        return f"Poor: the pipeline waits for {100 * step.bubble / step.total:.0f} % of each step. Try --search."
    best = min((one.seconds for one in fitting if one.seconds is not None), default=step.total)
    if best < FAR_FROM_BEST * step.total:
        return f"Poor: a single change makes it {step.total / best:.1f} times as fast. Try --search."
    return ""


def _figure(value: float) -> str:
    """Three figures: 18.5, 56,800, 629B."""
    for size, suffix in _SUFFIXES:
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 100 else f"{rounded:.3g}"
