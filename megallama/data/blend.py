"""Which source each sample of a run is of, and which of that source's: a pure function of weights and position.

The order of a period is that of the earliest deadline first over windows: sample j of a source of share w is due in
[floor(j / w), ceil((j + 1) / w)) (proportionate fairness, Baruah et al., Algorithmica 15, 1996). Every window is met,
so after k samples each source has less than one sample more or less than its share of k, the best there is (Tijdeman,
the chairman assignment problem, Discrete Mathematics 32, 1980). The order repeats after each period, so nothing as
long as the run is stored, and any position is found at once.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

import numpy as np

from megallama.errors import UserError

MOST_PERIOD = 1 << 18
"""Samples of a period at most: weights that take a longer one are rounded to it, by less than 1 / 2^18 each."""


class Pattern:
    """The order of sources of which each has so many samples in a period."""

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = counts
        """Samples of each source in a period."""
        self.period = sum(counts)
        self._order = np.array(_earliest_deadline_first(self.counts), np.int32)
        self._places = np.argsort(self._order, kind="stable").astype(np.int32)
        """[period] places by source, in order; those of source i begin at _begins[i]."""
        self._begins = np.cumsum([0, *self.counts])
        self._ranks = np.empty(self.period, np.int32)
        """[period] how many places of the same source are before."""
        self._ranks[self._places] = np.arange(self.period) - np.repeat(self._begins[:-1], self.counts)

    def locate(self, number: int) -> tuple[int, int]:
        """The source of sample `number`, and how many of its samples are before."""
        cycle, place = divmod(number, self.period)
        source = int(self._order[place])
        return source, cycle * self.counts[source] + int(self._ranks[place])

    def number(self, source: int, count: int) -> int:
        """The number of the sample of `source` that `count` of its samples are before: the inverse of `locate`."""
        cycle, rank = divmod(count, self.counts[source])
        return cycle * self.period + int(self._places[self._begins[source] + rank])

    def read(self, samples: int) -> list[int]:
        """How many of the first `samples` samples are of each source."""
        cycles, place = divmod(samples, self.period)
        within = np.bincount(self._order[:place], minlength=len(self.counts)).tolist()
        return [cycles * count + more for count, more in zip(self.counts, within, strict=True)]


class Stage(NamedTuple):
    """What is read from a sample on."""

    first_sample: int
    names: tuple[str, ...]
    """Of the sources, sorted, so that the order in which they are written means nothing."""
    pattern: Pattern

    @property
    def shares(self) -> dict[str, Fraction]:
        """What part of the samples each source has."""
        counts = zip(self.names, self.pattern.counts, strict=True)
        return {name: Fraction(count, self.pattern.period) for name, count in counts}


def stage_of(first_sample: int, weights: Mapping[str, float]) -> Stage:
    """A stage of such sources by name. UserError for a weight that is too small for a period."""
    names = sorted(weights)
    counts = period_counts([weights[name] for name in names])
    if 0 in counts:
        name = min(weights, key=lambda each: weights[each])
        least = sum(weights.values()) / MOST_PERIOD
        raise UserError(
            f"data.mixture: weight={weights[name]:g} of {name} is less than 1 in {MOST_PERIOD:,} of all weights, too "
            f"small to be met; use {least:.3g} or more, or leave the source out"
        )
    return Stage(first_sample, tuple(names), Pattern(counts))


class Blend:
    """The order of the sources of a run, whose weights may change at given samples.

    A source goes on in a stage where it was in the one before.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = tuple(stages)
        self.names = tuple(sorted({name for stage in stages for name in stage.names}))
        numbers = {name: number for number, name in enumerate(self.names)}
        self._members = [[numbers[name] for name in stage.names] for stage in stages]
        self._firsts = [stage.first_sample for stage in stages]

    @cached_property
    def _before(self) -> list[list[int]]:
        """[stages][sources] samples that are read before each stage."""
        before = [[0] * len(self.names)]
        for number in range(1, len(self.stages)):
            before.append(self._read(before, number - 1, self._firsts[number]))
        return before

    def _read(self, before: list[list[int]], stage: int, samples: int) -> list[int]:
        found = list(before[stage])
        read = self.stages[stage].pattern.read(samples - self._firsts[stage])
        for member, count in zip(self._members[stage], read, strict=True):
            found[member] += count
        return found

    def stage_at(self, number: int) -> int:
        """The stage that sample `number` is in."""
        return bisect_right(self._firsts, number) - 1

    def locate(self, number: int) -> tuple[int, int]:
        """The source of sample `number` of the run, and how many of its samples are before."""
        stage = self.stage_at(number)
        member, count = self.stages[stage].pattern.locate(number - self._firsts[stage])
        source = self._members[stage][member]
        return source, self._before[stage][source] + count

    def read(self, samples: int) -> list[int]:
        """How many of the first `samples` samples of the run are of each source."""
        return self._read(self._before, self.stage_at(max(samples - 1, 0)), samples)

    def number(self, source: int, count: int) -> int | None:
        """The number of the sample that `count` samples of `source` are before; None if it never comes."""
        for stage, members in enumerate(self._members):
            begun = self._before[stage][source]
            if source not in members or count < begun:
                continue
            found = self._firsts[stage] + self.stages[stage].pattern.number(members.index(source), count - begun)
            if stage + 1 == len(self.stages) or found < self._firsts[stage + 1]:
                return found
        return None


def period_counts(weights: Sequence[float]) -> tuple[int, ...]:
    """Samples of each source in the shortest period that has the weights exactly, as the decimals that were written.

    In MOST_PERIOD samples where that is longer: each is then the whole number below, or above for those that are cut
    most.
    """
    exact = [Fraction(repr(weight)) for weight in weights]
    unit = math.lcm(*(weight.denominator for weight in exact))
    units = [int(weight * unit) for weight in exact]
    largest = math.gcd(*units)
    if sum(units) // largest <= MOST_PERIOD:
        return tuple(each // largest for each in units)
    total = sum(units)
    counts, cut = zip(*(divmod(each * MOST_PERIOD, total) for each in units), strict=True)
    most_cut = set(sorted(range(len(units)), key=lambda source: -cut[source])[: MOST_PERIOD - sum(counts)])
    return tuple(count + (source in most_cut) for source, count in enumerate(counts))


def _earliest_deadline_first(counts: Sequence[int]) -> list[int]:
    """[sum of counts] the source at each place."""
    period, waiting, ready = sum(counts), [(0, source) for source in range(len(counts))], list[tuple[int, int]]()
    done, order = [0] * len(counts), [0] * period
    for place in range(period):
        while waiting and waiting[0][0] <= place:  # its window has begun
            _, source = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(done[source] + 1) * period // counts[source]), source))
        _, source = heapq.heappop(ready)
        order[place] = source
        done[source] += 1
        if done[source] < counts[source]:
            heapq.heappush(waiting, (done[source] * period // counts[source], source))
    return order
