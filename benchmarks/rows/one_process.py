"""Rows C1, C2 and C5 of the table: one process, beside the products that its work is made of."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import torch
from contenders import floor
from rows import loss_head
from rows.table import Aim, Found, Line, median_ratio, spread
from step import COMPARED_STEPS, LOSS_TOLERANCE, Score, Settings, measure

from megallama.config.schema import RunConfig

EAGER = ("engine", "bare", "transformers", "litgpt")
COMPILED = ("engine-compile", "transformers-compile", "litgpt-compile")
AUTOCAST = ("transformers-autocast", "transformers-autocast-compile")
OF_FLOOR = {"fp32": 0.85, "bf16": 0.50}
LARGE_VOCABULARY = 128 * 1024


def training_step(row: str, config: RunConfig, settings: Settings, only: tuple[str, ...] = ()) -> Found:
    """C1: one step of each contender. Ours is eager beside what is eager, compiled beside what is compiled."""
    names = [*EAGER, *COMPILED, *(AUTOCAST if config.train.dtype == "bf16" else ())]
    if only:
        names = [name for name in names if name in only]
    found = Found()
    scores = measure([*names, floor.NAME], config, torch.device("cpu"), settings, found.notes)
    compare(row, scores, config, found, lambda name: "engine-compile" if name.endswith("-compile") else "engine")
    aims = found.aims
    aims += time_aim(scores, "engine-compile", "transformers-compile", 0.90)
    for eager in ("engine", "engine-compile"):
        if eager in scores and floor.NAME in scores:
            share = median_ratio(scores[floor.NAME].round_medians, scores[eager].round_medians)
            aims.append(Aim(f"share of the floor, {eager}", share, OF_FLOOR[config.train.dtype], at_most=False))
    if config.train.dtype == "bf16":
        aims += time_aim(scores, "engine", "transformers-autocast", 1 / 1.2)
        aims += time_aim(scores, "engine-compile", "transformers-autocast-compile", 1 / 1.2)
    for one, other in (("engine", "transformers"), ("engine-compile", "transformers-compile")):
        aims += memory_aim(scores, one, other, 0.6)
    return found


def engine_overhead(row: str, config: RunConfig, settings: Settings, bound: float, *, processor: bool = False) -> Found:
    """C5: the engine over a bare loop around the same model."""
    found = Found()
    scores = measure(["engine", "bare", floor.NAME], config, torch.device("cpu"), settings, found.notes)
    compare(row, scores, config, found, lambda name: "engine")
    if "engine" in scores and "bare" in scores:
        one, other = scores["engine"], scores["bare"]
        spent = [[round_.processor_seconds for round_ in score.rounds] for score in (one, other)]
        times = median_ratio(one.round_medians, other.round_medians)
        found.notes.append(f"engine / bare: time {times:.3f}, processor time {median_ratio(*spent):.3f}")
        if processor:
            found.aims.append(Aim("processor time engine / bare", median_ratio(*spent), bound))
        else:
            found.aims.append(Aim("time engine / bare", times, bound))
    return found


def loss_heads(row: str, config: RunConfig, settings: Settings) -> Found:
    """C2: forward and backward of the loss head of each contender.

    A chunk of ours is all of the logits where these are few, so memory is an aim of large vocabularies alone.
    """
    found = Found()
    scores = measure(loss_head.NAMES, config, torch.device("cpu"), settings, found.notes, loss_head.build)
    compare(row, scores, config, found, lambda name: "ours")
    found.aims += time_aim(scores, "ours", "F.cross_entropy", 1.05)
    if config.model.vocab_size >= LARGE_VOCABULARY:
        found.aims += memory_aim(scores, "ours", "F.cross_entropy", 0.25)
    return found


def compare(row: str, scores: dict[str, Score], config: RunConfig, found: Found, ours_of: Callable[[str], str]) -> None:
    """A line for each contender; those whose losses are not those of the first did other work."""
    models = [name for name in scores if name != floor.NAME]
    for name, score in scores.items():
        ours = scores.get(ours_of(name))
        products, differs = scores.get(floor.NAME), None
        if name != floor.NAME:
            differs = loss_difference(scores[models[0]], score)
            if not differs <= LOSS_TOLERANCE[config.train.dtype]:
                found.wrong.append(f"the losses of {name} differ from those of {models[0]} by {differs:.1e}")
        seconds = [second for round_ in score.rounds for second in round_.seconds]
        ratio = None if ours is None else median_ratio(ours.round_medians, score.round_medians)
        share = None if products is None else median_ratio(products.round_medians, score.round_medians)
        size = None if name == floor.NAME else memory(score)
        found.lines.append(
            Line(row, name, median(seconds), "ms", spread(seconds), ratio, share, size, differs, counted(score))
        )


def counted(score: Score) -> str:
    """Processor time of a step."""
    steps = [round_.processor_seconds / len(round_.seconds) for round_ in score.rounds]
    return f"{1e3 * median(steps):.4g} ms of processors"


def memory(score: Score) -> int:
    """The most resident during timed steps, without what Python and torch took before anything was built."""
    return max(round_.peak_memory_bytes for round_ in score.rounds) - score.memory_before_bytes


def loss_difference(one: Score, other: Score) -> float:
    """The largest relative one of the first steps."""
    pairs = zip(one.losses[:COMPARED_STEPS], other.losses[:COMPARED_STEPS], strict=True)
    return max(abs(a - b) / abs(a) for a, b in pairs)


def time_aim(scores: dict[str, Score], one: str, other: str, bound: float) -> list[Aim]:
    """Of the time of one by that of another, if both ran."""
    if one not in scores or other not in scores:
        return []
    ratio = median_ratio(scores[one].round_medians, scores[other].round_medians)
    return [Aim(f"time {one} / {other}", ratio, bound)]


def memory_aim(scores: dict[str, Score], one: str, other: str, bound: float) -> list[Aim]:
    """Of the memory of one by that of another, if both ran."""
    if one not in scores or other not in scores:
        return []
    return [Aim(f"memory {one} / {other}", memory(scores[one]) / memory(scores[other]), bound)]
