"""Collectives of a stage for one micro-batch, forward and backward, as its layers issue them. Pure.

Bytes are those of the whole message: the tensor that is reduced, what an all-gather makes, what a reduce-scatter takes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from megallama.config.schema import RunConfig
from megallama.layout.counts import FORWARD_AGAIN
from megallama.layout.stages import Stage
from megallama.plan.memory.activations import Tensors, in_tiles, logits_chunk, tensors


@dataclass
class Traffic:
    """Number and bytes by kind of collective: all_reduce, all_gather, reduce_scatter, all_to_all."""

    number: Counter[str] = field(default_factory=Counter)
    size: Counter[str] = field(default_factory=Counter)

    def add(self, kind: str, size: int, times: int = 1) -> None:
        """`times` collectives of `size` bytes each."""
        if times:
            self.number[kind] += times
            self.size[kind] += times * size

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.number + other.number, self.size + other.size)


def stage_traffic(config: RunConfig, stage: Stage, count: int, backwards: int = 1) -> Traffic:
    """The tensor-parallel collectives of stage `stage` of `count`.

    A backward in two parts runs what is computed again in each: `backwards` of them.
    """
    found, of = Traffic(), tensors(config)
    if config.parallel.tensor == 1:
        return found
    _add_layers(found, config, of, len(stage.layers), backwards)
    cut = config.parallel.sequence_parallel
    if stage.index == 0:
        found.add("reduce_scatter" if cut else "all_reduce", of.whole_state)
        found.add("all_gather", of.whole_state, int(cut))
    if stage.index == count - 1:
        _add_head(found, of, cut)
    return found


def context_traffic(config: RunConfig, layers: int, backwards: int = 1) -> Traffic:
    """The context-parallel collectives of so many layers.

    Keys and values are gathered together and their gradients scattered; or they go from sequence to heads, as queries
    do, and what attention makes of them back, and their gradients likewise. Full recomputation runs a forward again.
    """
    found, of = Traffic(), tensors(config)
    if of.context == 1:
        return found
    again = backwards * layers if config.train.recompute in FORWARD_AGAIN else 0
    if of.exchanges:
        for width in (2 * of.key, of.query, of.query):
            found.add("all_to_all", of.element * of.positions * width, 2 * layers + again)
        return found
    found.add("all_gather", 2 * of.element * of.keys, layers + again)
    found.add("reduce_scatter", 2 * of.element * of.keys, layers)
    return found


def _add_layers(found: Traffic, config: RunConfig, of: Tensors, layers: int, backwards: int) -> None:
    """Two pairs of column and row per layer (arXiv 1909.08053, section 3; arXiv 2205.05198, section 4.2).

    Full recomputation runs a forward again up to the last tensor that it needs, the input of the down projection.
    """
    again = backwards * layers if config.train.recompute in FORWARD_AGAIN else 0
    if config.parallel.sequence_parallel:
        # An MLP in tiles is not run again before its backward, each part of which gathers its input.
        gathered = again + (backwards - 1) * layers if in_tiles(of, config.train.recompute) else 2 * again
        # Forward, the gradients of the rows' outputs, and the columns' inputs for their weights' gradients.
        found.add("all_gather", of.whole_state, 6 * layers + gathered)
        found.add("reduce_scatter", of.whole_state, 4 * layers + again)
        found.add("all_reduce", of.element * of.hidden, 2 * layers)  # the norms' weights
    else:
        found.add("all_reduce", of.whole_state, 4 * layers + again)
    if of.gathers_heads:
        heads = of.element * of.positions * config.model.kv_heads * config.model.head_size
        found.add("all_gather", heads, 2 * (layers + again))
        found.add("reduce_scatter", heads, 2 * layers)


def _add_head(found: Traffic, of: Tensors, cut: bool) -> None:
    """The input's gather or gradient; for each chunk of the loss the maximum, then two sums together, in fp32."""
    if cut:
        found.add("all_gather", of.whole_state)
        found.add("reduce_scatter", of.whole_state)
        found.add("all_reduce", of.element * of.hidden)
    else:
        found.add("all_reduce", of.whole_state)
    chunk = logits_chunk(of)
    for start in range(0, of.positions, chunk):
        positions = min(chunk, of.positions - start)
        found.add("all_reduce", 4 * positions)
        found.add("all_reduce", 2 * 4 * positions)
