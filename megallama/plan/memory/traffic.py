"""Collectives of a stage for one micro-batch, forward and backward, as its layers issue them. Pure.

Bytes are those of the whole message: the tensor that is reduced, what an all-gather makes, what a reduce-scatter takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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

    def only(self, kind: str) -> Traffic:
        """Those of one kind."""
        return Traffic(Counter({kind: self.number[kind]}), Counter({kind: self.size[kind]}))

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


def norm_shares(config: RunConfig, stage: Stage, count: int) -> list[int]:
    """The widths of norms of stage `stage` of `count` of whose gradients each tensor-parallel rank has a share."""
    model, parallel = config.model, config.parallel
    found = [model.hidden_size] * 2 if parallel.sequence_parallel else []
    if model.qk_norm and parallel.tensor > 1:
        found += [model.head_size] * 2
    last = [model.hidden_size] if parallel.sequence_parallel and stage.index == count - 1 else []
    return found * len(stage.layers) + last


def step_traffic(config: RunConfig, mine: Sequence[Stage], count: int) -> Traffic:
    """The tensor-parallel collective of a step, whatever its micro-batches, of a rank with the stages `mine`.

    Those shares summed, in fp32 and all together. Where data-parallel ranks share the optimizer, each sends its part.
    """
    found, elements = Traffic(), sum(sum(norm_shares(config, stage, count)) for stage in mine)
    found.add("all_reduce", 4 * elements, int(elements > 0))
    return found


def beside_matmuls(config: RunConfig, layers: int) -> Traffic:
    """Of the collectives of so many layers those that run beside a matmul: of the columns, in backward.

    The gather of the input runs beside the matmul of its gradient, and the sum of that beside the matmul of the
    weight's. Gate and up in tiles wait for both.
    """
    found, of = Traffic(), tensors(config)
    columns = layers * (1 if in_tiles(of, config.train.recompute) else 2)
    if config.parallel.sequence_parallel:
        found.add("all_gather", of.whole_state, columns)
        found.add("reduce_scatter", of.whole_state, columns)
    elif config.parallel.tensor > 1:
        found.add("all_reduce", of.whole_state, columns)
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
    else:
        found.add("all_reduce", of.whole_state)
    chunk = logits_chunk(of)
    for start in range(0, of.positions, chunk):
        positions = min(chunk, of.positions - start)
        found.add("all_reduce", 4 * positions)
        found.add("all_reduce", 2 * 4 * positions)
