"""Which weights `train.freeze` keeps as they are. Pure."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import TYPE_CHECKING

from megallama.errors import UserError
from megallama.layout.counts import count_parameters, weight_shapes

if TYPE_CHECKING:
    from megallama.config.schema import ModelConfig, RunConfig

FUSED = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"))
"""Weights of a layer that are one matrix in memory, and so one to the optimizer."""
_TOGETHER = ("self_attn.[qkv]_proj", "mlp.[gu]*_proj")
"""A pattern for each."""


def frozen_weights(model: ModelConfig, patterns: Sequence[str]) -> frozenset[str]:
    """The names of all weights that a pattern matches, as a shell matches files; `*` matches dots as well.

    UserError for a pattern that matches none, for a part of weights that are one matrix, and where nothing is left.
    """
    if not patterns:
        return frozenset()
    if model.block != "llama":
        raise UserError(f"train.freeze does not go with model.block={model.block}; use train.freeze=[]")
    names = list(weight_shapes(model))
    frozen = set[str]()
    for pattern in patterns:
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            raise UserError(_no_match(pattern, names, tied=model.tie_word_embeddings))
        frozen.update(matched)
    _refuse_parts(model, frozen)
    if len(frozen) == len(names):
        raise UserError(
            f"train.freeze=[{', '.join(patterns)}] leaves nothing to train, since it matches every weight; "
            "leave a pattern out"
        )
    return frozenset(frozen)


def checkpoint_bytes(config: RunConfig) -> int:
    """What one checkpoint takes, names and places of tensors left out.

    Weights, and of what is trained two moments, and the average if there is one.
    """
    frozen = sum(map(math.prod, frozen_shapes(config.model, config.train.freeze).values()))
    total, beside = count_parameters(config.model).total, 8 if config.train.average.kind == "none" else 12
    return 4 * total + beside * (total - frozen)


def frozen_elements(config: RunConfig, layers: Collection[range], first: bool, last: bool) -> int:
    """Elements of the frozen weights, unpadded, on a rank with these layers and the `first` or the `last` stage.

    A tied matrix is held once, also where a V begins and ends on one rank. UserError as above.
    """
    if not config.train.freeze:
        return 0
    total, mine = 0, {str(layer) for stage in layers for layer in stage}
    for name, shape in frozen_shapes(config.model, config.train.freeze).items():
        _, kind, *place = name.split(".")
        here = place[0] in mine if kind == "layers" else first if kind == "embed_tokens" else last
        total += here * -(-math.prod(shape) // (config.parallel.tensor if len(shape) > 1 else 1))
    return total


def frozen_matmul(config: RunConfig) -> int:
    """Of the weights that multiply every token, those that are frozen; UserError as above."""
    shapes = frozen_shapes(config.model, config.train.freeze)
    gathered = set() if config.model.tie_word_embeddings else {"model.embed_tokens.weight"}
    return sum(math.prod(shape) for name, shape in shapes.items() if len(shape) > 1 and name not in gathered)


@cache
def frozen_shapes(model: ModelConfig, patterns: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """The frozen weights as `weight_shapes` gives them; UserError as of `frozen_weights`."""
    frozen = frozen_weights(model, patterns)
    return {name: shape for name, shape in weight_shapes(model).items() if name in frozen}


def _no_match(pattern: str, names: Sequence[str], *, tied: bool) -> str:
    if tied and fnmatchcase("lm_head.weight", pattern):
        return (
            f"train.freeze names {pattern!r}, and with model.tie_word_embeddings=true the head is the embedding; "
            "use model.embed_tokens.weight, which freezes both"
        )
    nearest = max(names, key=lambda name: difflib.SequenceMatcher(None, name, pattern).ratio())
    return f"train.freeze names {pattern!r}, which matches no weight; the nearest name is {nearest}"


def _refuse_parts(model: ModelConfig, frozen: set[str]) -> None:
    for layer in range(model.num_hidden_layers):
        for group, together in zip(FUSED, _TOGETHER, strict=True):
            names = [f"model.layers.{layer}.{name}.weight" for name in group]
            inside = [name for name in names if name in frozen]
            if inside and len(inside) < len(names):
                outside = " and ".join(name for name in names if name not in frozen)
                raise UserError(
                    f"train.freeze freezes {' and '.join(inside)} and not {outside}, which are one matrix in memory; "
                    f"freeze all of them, as model.layers.{layer}.{together}.weight, or none"
                )
