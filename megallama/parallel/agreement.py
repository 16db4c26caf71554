"""Whether all ranks run the same: configuration, code, data and tokenizer, held against each other before any group.

Ranks that differ would train on, silently wrong, or wait for each other for ever. Where they agree this is one
collective of a digest; only where they do not, a second and a third one bring every rank's facts to every rank.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version

import torch
import torch.distributed as dist

import megallama
from megallama.config.data_keys import MixtureStage
from megallama.config.keys import MIXTURE, NAMED
from megallama.config.schema import RunConfig
from megallama.errors import SharedError

PACKAGES = ("torch", "deepspeed", "numpy")
MAY_DIFFER = ("data.path", "data.validation_path", "data.tokenizer")
"""Where a node keeps its copies, as the keys below NAMED and the paths of MIXTURE; what is in them is compared."""
_MOST_FACTS, _MOST_VALUES, _MOST_RANKS, _MOST_CHARACTERS = 6, 3, 8, 60
_WORDS = 8
"""The number of 32-bit words in a digest of SHA-256."""

Facts = Mapping[str, str]


def facts_of(config: RunConfig, contents: Facts) -> dict[str, str]:
    """What must be the same on all ranks, each by the name that a sentence calls it by; `contents` are hashes."""
    dumped = _flat(config.model_dump(mode="json"))
    keys = {key: value for key, value in dumped if key not in MAY_DIFFER and not key.startswith(NAMED)}
    if config.data.mixture is not None:
        keys[MIXTURE] = json.dumps([_without_paths(stage) for stage in config.data.stages])
    return {
        **keys,
        **contents,
        "the version of python": platform.python_version(),
        **{f"the version of {package}": version(package) for package in PACKAGES},
        **_source(),
    }


def _without_paths(stage: MixtureStage) -> dict[str, object]:
    sources = [source.model_copy(update={"name": source.called}) for source in stage.sources]
    return {"from_step": stage.from_step, "sources": [source.model_dump(exclude={"path"}) for source in sources]}


def check_same(facts: Facts, device: torch.device) -> None:
    """SharedError, on every rank, where `facts` are not the same on all; every rank of the job must call it."""
    if dist.get_world_size() == 1:
        return
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()
    words = [int.from_bytes(digest[4 * word : 4 * word + 4]) for word in range(_WORDS)]
    # The largest of a number and of its negative are the largest and the smallest: where both are ours, all are.
    extremes = torch.tensor([*words, *(-word for word in words)], dtype=torch.int64, device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    largest, negated = extremes.tolist()[:_WORDS], extremes.tolist()[_WORDS:]
    if largest != [-word for word in negated]:
        nodes, every = zip(*_of_all_ranks({"node": socket.gethostname(), "facts": facts}, device), strict=True)
        raise SharedError(differences(every, nodes))


def differences(every: Sequence[Facts], nodes: Sequence[str]) -> str:
    """The sentence on the facts, of each rank by its number, that are not the same on all of them."""
    names = list(dict.fromkeys(name for facts in every for name in facts))
    told = [_difference(name, every, nodes) for name in names if len({facts.get(name) for facts in every}) > 1]
    more = f"; and {len(told) - _MOST_FACTS} more" if len(told) > _MOST_FACTS else ""
    return (
        f"the ranks would not run the same: {'; '.join(told[:_MOST_FACTS])}{more}; give all nodes the same files "
        "and software, and all ranks the same command"
    )


def _difference(name: str, every: Sequence[Facts], nodes: Sequence[str]) -> str:
    ranks: dict[str | None, list[int]] = {}
    for rank, facts in enumerate(every):
        ranks.setdefault(facts.get(name), []).append(rank)
    groups = [f"{_shortened(value)} on {_named(members, nodes)}" for value, members in ranks.items()]
    more = f" and {len(groups) - _MOST_VALUES} other values" if len(groups) > _MOST_VALUES else ""
    return f"{name} is {' and '.join(groups[:_MOST_VALUES])}{more}"


def _shortened(value: str | None) -> str:
    if value is None:
        return "missing"
    return value if len(value) <= _MOST_CHARACTERS else f"{value[: _MOST_CHARACTERS - 3]}..."


def _named(ranks: Sequence[int], nodes: Sequence[str]) -> str:
    """`ranks 0-3,6 (node1, node2)`."""
    stretches: list[list[int]] = []
    for rank in ranks:
        if stretches and stretches[-1][1] == rank - 1:
            stretches[-1][1] = rank
        else:
            stretches.append([rank, rank])
    words = [str(first) if first == last else f"{first}-{last}" for first, last in stretches]
    there = list(dict.fromkeys(nodes[rank] for rank in ranks))
    numbers = ",".join(words[:_MOST_RANKS]) + (",..." if len(words) > _MOST_RANKS else "")
    where = ", ".join(there[:_MOST_VALUES]) + (", ..." if len(there) > _MOST_VALUES else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} ({where})"


def _of_all_ranks(mine: object, device: torch.device) -> Iterator[tuple[str, Facts]]:
    """The node and the facts of each rank: JSON in plain tensors, which no peer can make code of."""
    text = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8).to(device)
    longest = torch.tensor(len(text), device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    padded = torch.full((int(longest),), ord(" "), dtype=torch.uint8, device=device)
    padded[: len(text)] = text
    every = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(every, padded)
    for other in every:
        said = json.loads(bytes(other.tolist()))
        yield said["node"], said["facts"]


def _flat(tree: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted keys and their values as JSON; a section that is null is a value."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value)


def _source() -> dict[str, str]:
    """A hash of each file of this package."""
    found = {}
    root = os.path.dirname(megallama.__file__)
    for folder, _, names in os.walk(root):
        for name in names:
            if name.endswith((".py", ".yaml")):
                path = os.path.join(folder, name)
                with open(path, "rb") as file:
                    found[f"the code of megallama{path[len(root) :]}"] = hashlib.sha256(file.read()).hexdigest()[:16]
    return dict(sorted(found.items()))
