"""The first screen of a plan: whether a run fits, how long it takes and why, and what would help most. Pure."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu
from megallama.layout.batching import dp_size
from megallama.layout.budget import planned_tokens
from megallama.layout.counts import count_parameters
from megallama.layout.scaling_laws import optimal_tokens
from megallama.layout.schedules import schedule_of
from megallama.plan.memory.ledger import host_bytes, rank_bytes
from megallama.plan.memory.state import GIB
from megallama.plan.report.table import Part, Row
from megallama.plan.report.time import run_cost, speed
from megallama.plan.search.changes import Change, single_changes
from megallama.plan.time.software import Machine
from megallama.plan.time.step_time import StepTime

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

    def render(self) -> str:
        """At most 20 lines of at most 80 characters."""
        indent = 2 + max(len(label) for label, _ in self.lines)
        found = textwrap.wrap(self.title, WIDTH)
        for label, sentence in self.lines:
            together = sentence.replace(" %", "\0%").replace(" GiB", "\0GiB")  # a number and its unit
            wrapped = textwrap.wrap(together, WIDTH, initial_indent=f"{label:{indent}}", subsequent_indent=" " * indent)
            found += [line.replace("\0", " ") for line in wrapped]
        return "\n".join([*found, *textwrap.wrap(self.warning, WIDTH)])


Timed = tuple[Machine, StepTime]
"""What a run is planned on, and the time of one of its steps."""


def changes_part(config: RunConfig, world_size: int, on: Machine) -> Part:
    """Every single change of the layout that is legal, with the seconds of a step."""
    changes = single_changes(config, world_size, int(on.gpu.gpus_per_node or 1))
    rows = [
        Row(one.words, one.words, f"now {one.instead_of}; {one.size / GIB:.2f} GiB", seconds, "s")
        for one in changes
        if (seconds := one.seconds(on)) is not None
    ]
    return Part("changes", "Single changes of the layout, with the memory that they need", tuple(rows))


def summarise(
    config: RunConfig,
    world_size: int,
    gpu: Gpu | None = None,
    timed: Timed | UserError | None = None,
    tokens: float | None = None,
    price: float | None = None,
) -> Summary:
    """The first screen of a legal run; without a kind of GPU it has no time, and nothing to fit into."""
    title = f"{_figure(count_parameters(config.model).total)} parameters on {world_size} x "
    length = planned_tokens(config, tokens)
    layout, lines, warning = _layout(config, world_size), list[tuple[str, str]](), ""
    if gpu is None:
        needed = f"{_memory(config, world_size)}; --gpu h100 says whether it fits, and how long it takes"
        return Summary(f"{title}GPU: {layout}", (("memory", needed), ("tokens", _length(config, length)), _MORE))
    if gpu.memory_gib is not None:
        lines.append(("memory", _fit(config, world_size, gpu)))
    on, step = timed if isinstance(timed, tuple) else (None, None)
    if on is not None and step is not None:
        lines += _time(config, world_size, on, step, length, price)
    lines.append(("tokens", _length(config, length)))
    if gpu.memory_gib is not None:
        changes = single_changes(config, world_size, int(gpu.gpus_per_node or 1))
        beside = [(one, one.seconds(on)) for one in changes]
        lines += _changes(config, world_size, gpu, step, beside)
        warning = _warning(step, [seconds for one, seconds in beside if one.size <= gpu.usable_bytes])
    return Summary(f"{title}{gpu.name}: {layout}", (*lines, _MORE), warning)


_SHARES = ("compute", "tensor", "context", "pipeline", "bubble", "data", "optimizer")
_MORE = ("more", "--explain: the arithmetic; --search: other layouts; --json: everything")


def _layout(config: RunConfig, world_size: int) -> str:
    parallel, train = config.parallel, config.train
    words = [f"tp {parallel.tensor}", f"pp {parallel.pipeline}", f"dp {dp_size(config, world_size)}"]
    words += [f"cp {parallel.context} {parallel.context_mode}"] if parallel.context > 1 else []
    if parallel.pipeline > 1:
        chunks = "" if schedule_of(parallel).stages_per_rank else f" x{parallel.chunks}"
        words.append(f"{parallel.schedule}{chunks}")
    zero = f"ZeRO-{config.zero.stage}{' offloaded' if config.zero.offload_optimizer == 'cpu' else ''}"
    return ", ".join([*words, zero, f"micro-batch {train.micro_batch_size}", f"recompute {train.recompute}"])


def _memory(config: RunConfig, world_size: int) -> str:
    sizes = rank_bytes(config, world_size)
    where = f" on pipeline rank {sizes.index(max(sizes))}" if len(sizes) > 1 else ""
    host = max(host_bytes(config, dp_size(config, world_size)))
    return f"{max(sizes) / GIB:.1f} GiB{where}{f', {host / GIB:.1f} GiB of its host' if host else ''}"


def _fit(config: RunConfig, world_size: int, gpu: Gpu) -> str:
    usable = gpu.usable_bytes
    free = usable - max(rank_bytes(config, world_size))
    verdict = f"fits with {free / GIB:.1f} GiB left" if free >= 0 else f"does not fit by {-free / GIB:.1f} GiB"
    return f"{verdict}: {_memory(config, world_size)}, {usable / GIB:.1f} GiB usable"


def _time(
    config: RunConfig, world_size: int, on: Machine, step: StepTime, tokens: float, price: float | None
) -> list[tuple[str, str]]:
    rate = speed(config, world_size, on.gpu, step.total)
    cost = run_cost(config, world_size, on, step.total, tokens, price)
    money = "" if cost.money is None else f", {_figure(cost.money)} at {price:g} per GPU-hour"
    parts = ((name, getattr(step, name)) for name in _SHARES)
    shares = [f"{name} {100 * seconds / step.total:.0f} %" for name, seconds in parts if seconds]
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
    config: RunConfig, world_size: int, gpu: Gpu, step: StepTime | None, beside: list[tuple[Change, float | None]]
) -> list[tuple[str, str]]:
    """The two that help most, of two keys: towards fitting where the run does not, else towards speed."""
    now, limit = max(rank_bytes(config, world_size)), gpu.usable_bytes
    if now > limit:
        smaller = [(one, seconds) for one, seconds in beside if one.size < now]
        chosen = sorted(smaller, key=lambda each: (each[0].size > limit, each[1] or 0.0, each[0].size))
    elif step is not None:
        most = WORTH_NAMING * step.total
        faster = [(one, s) for one, s in beside if s is not None and s < most and one.size <= limit]
        chosen = sorted(faster, key=lambda each: each[1] or 0.0)
    else:
        return []
    best = {one.key: (one, seconds) for one, seconds in reversed(chosen)}  # of each key the first
    lines = [
        f"{one.words} (now {one.instead_of}): {_effect(one, seconds, now, limit, step)}"
        for one, seconds in sorted(best.values(), key=chosen.index)[:2]
    ]
    if not lines and ((step is not None and not step.assumed) or now > limit):
        lines = [f"none of {len(beside)} single changes of the layout helps"]
    return [("" if number else "better", line) for number, line in enumerate(lines)]


def _effect(one: Change, seconds: float | None, now: int, limit: int, step: StepTime | None) -> str:
    words = []
    if step is not None and seconds is not None:
        change = seconds / step.total - 1
        words.append(f"{abs(100 * change):.0f} % {'faster' if change < 0 else 'slower'}")
    if abs(one.size - now) > 0.05 * GIB:
        words.append(f"{'frees' if one.size < now else 'takes'} {abs(one.size - now) / GIB:.1f} GiB")
    return ", ".join([*words, "fits" if one.size <= limit else "does not fit yet"])


def _warning(step: StepTime | None, fitting: list[float | None]) -> str:
    if step is None or step.assumed:
        return ""
    if step.bubble > LARGE_BUBBLE * step.total:
        return f"Poor: the pipeline waits for {100 * step.bubble / step.total:.0f} % of each step. Try --search."
    best = min((seconds for seconds in fitting if seconds is not None), default=step.total)
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
