"""What ranks tell each other is JSON, and arrives as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megallama.layout.topology import Topology
from megallama.parallel.mesh import Launch, build_mesh
from megallama.parallel.plain import from_first, of_all
from megallama.parallel.spawn import RankFailedError, run_ranks

VALUES = ["", "naïve 日本語 \x00 " * 10_000, [], {"error": None, "bytes": 2**60, "cpu_seconds": 0.25}, ["a", ["b"]]]


def exchange(launch: Launch, values: list[Any]) -> list[Any]:
    device = torch.device("cpu")
    launch.prepare(device)
    mesh = build_mesh(Topology(dp=launch.world_size), launch, device)
    told = [from_first(value if mesh.rank == 0 else "another", mesh.world.group, device) for value in values]
    return [told, of_all(values[mesh.rank], mesh.world.group, device)]


def test_every_rank_hears_what_was_said() -> None:
    assert run_ranks(exchange, 3, VALUES) == [[VALUES, VALUES[:3]]] * 3


def test_what_is_no_json_is_not_sent() -> None:
    with pytest.raises(RankFailedError, match="not JSON serializable"):
        run_ranks(exchange, 1, [b"bytes"])
