"""Documents changed in any of their values, for property tests."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

HOSTILE = st.sampled_from(
    [
        *(None, True, False, -1, 0, 1, 2, 3, 4, 8, 1.5, 2**31, 2**53, 10**18, 2**63, 2**64, 10**400, 1e400, -1e400),
        *(math.nan, "", "3", "x", "..", "../x", "/etc/passwd", "state.json", "rank_00000.bin", "rank_00001.bin"),
        *("\x1b[31m", "\x00", "\ud800", "é" * 300, [], {}, [[]], [0], [1] * 24, [2] * 43, [1, 1], [4, 4], {"a": 1}),
        *([10**9] * 2, [2**40], [2**31, 2**31]),
    ]
)


SHAPES = st.lists(st.integers(0, 9), max_size=3)


VALUES = st.one_of(HOSTILE, SHAPES, st.integers(-2, 40), st.integers(0, 64).map(lambda n: 4 * n))


def places_in(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value of a JSON document but the whole of it."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield (*at, key)
        yield from places_in(tree[key], (*at, key))


def mutated(tree: Any, data: st.DataObject, most: int = 3) -> Any:
    """The document with one value replaced, dropped, repeated or exchanged, once or up to `most` times over."""
    tree = json.loads(json.dumps(tree))
    for _ in range(data.draw(st.integers(1, most))):
        places = list(places_in(tree))
        if not places:
            break
        *way, key = data.draw(st.sampled_from(places))
        node = tree
        for step in way:
            node = node[step]
        match data.draw(st.sampled_from(("replace", "replace", "drop", "repeat", "exchange", "nest"))):
            case "replace":
                node[key] = deepcopy(data.draw(VALUES))
            case "drop":
                del node[key]
            case "repeat" if isinstance(node, list):
                node.insert(key, deepcopy(node[key]))
            case "repeat":
                node[f"{key}.more"] = deepcopy(node[key])
            case "exchange":
                other = data.draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
                node[key], node[other] = node[other], node[key]
            case _:
                node[key] = [node[key]]
    return tree
