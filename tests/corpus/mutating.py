"""Files changed in any of their bytes or values, for property tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

Files = dict[str, bytes]
Mutation = Callable[[Files], None]

WIDTHS = {1: (1, False), 2: (1, True), 3: (2, True), 4: (4, True), 5: (8, True), 8: (2, False)}
EDGES = [0, 1, 2, 7, 255, 2**15, 2**31 - 1, 2**31, 2**32, 2**61, 2**62, 2**62 + 1, 2**63 - 1, 2**63, 2**64 - 1]
EDGES += [-1, -2, -(2**31), -(2**62), -(2**63)]
PATTERNS = ["", "a", ".", "(open", "(x+x+)+y(?=z)|\\s|.", "(" * 3000, "\\p{Nonsense}", " ?\\p{L}+|\\s+|[^\\s\\p{L}]+"]
VALUES: list[Any] = [None, True, "", "text", [], {}, [1], {"a": {}}, 0, 1, -1, 2.5, 256, 263, 300, 10**20, float("nan")]
VALUES += [float("inf"), "\ud800", "x" * 5000, 2**31 - 2, 2**31, *PATTERNS]
DEEP = b"[" * 100_000


INTEGERS = [(9, 8), (17, 1), (18, 8), (26, 8)]
INTEGERS += [(34 + 4 * number, 4) for number in range(8)] + [(66 + 8 * number, 8) for number in range(17)]
"""Offset and width of each in the index of eight documents."""


@st.composite
def integers_changed(draw: st.DrawFn) -> Mutation:
    """A few integers of the index become others, most often next to each other."""
    first = draw(st.integers(0, len(INTEGERS) - 1))
    values = draw(st.lists(st.sampled_from(EDGES), min_size=1, max_size=3))

    def change(files: Files) -> None:
        content = bytearray(files["X.idx"])
        for number, value in enumerate(values):
            offset, width = INTEGERS[(first + number) % len(INTEGERS)]
            content[offset : offset + width] = (value % 256**width).to_bytes(width, "little")
        files["X.idx"] = bytes(content)

    return change


@st.composite
def bytes_changed(draw: st.DrawFn, *names: str) -> Mutation:
    """A file is cut, made longer, or has other bytes in it."""
    name, how = draw(st.sampled_from(names)), draw(st.sampled_from(["cut", "put", "insert", "append", "repeat"]))
    place, some = draw(st.integers(0, 3000)), draw(st.binary(min_size=1, max_size=9))

    def change(files: Files) -> None:
        content = files[name]
        at = place % (len(content) + 1)
        changed = {
            "cut": content[:at],
            "put": content[:at] + some + content[at + len(some) :],
            "insert": content[:at] + some + content[at:],
            "append": content + some,
            "repeat": content + content[at:],
        }
        files[name] = changed[how]

    return change


@st.composite
def json_changed(draw: st.DrawFn, name: str, keys: list[str]) -> Mutation:
    """A value of a JSON object is another, or gone, or one is added."""
    key = draw(st.sampled_from([*keys, "new"]))
    value = draw(st.one_of(st.integers(1, 400), st.sampled_from([*VALUES, "gone", "deep"])))

    def change(files: Files) -> None:
        try:
            tree = json.loads(files[name])
        except (ValueError, RecursionError):
            return
        if not isinstance(tree, dict):
            return
        if value == "gone":
            tree.pop(key, None)
        else:
            tree[key] = value
        files[name] = json.dumps(tree).encode().replace(b'"deep"', DEEP)

    return change


def file_replaced(*names: str) -> st.SearchStrategy[Mutation]:
    """Something else stands in the place of a file."""
    others = {
        "nothing": b"",
        "deep": DEEP,
        "null": b"null",
        "zeros": bytes(40),
        "gone": None,
        "fifo": None,
        "dir": None,
    }

    def make(name: str, other: str) -> Mutation:
        def change(files: Files) -> None:
            content = others[other]
            if content is not None:
                files[name] = content
            else:
                files.pop(name, None)
                if other != "gone":
                    files[f"{other}:{name}"] = b""

        return change

    return st.builds(make, st.sampled_from(names), st.sampled_from(list(others)))
