"""The groups of a mesh: whom they join, and how few are made."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks

MADE = {
    Topology(dp=4): 1,
    Topology(tp=4): 1,
    Topology(pp=2, tp=2): 3,
    Topology(dp=2, tp=2): 2,
    Topology(pp=2, dp=2): 2,
}
"""Groups that each rank of four makes: data and model stand for one rank where there are no more."""


def sums(launch: Launch, topologies: list[Topology]) -> list[tuple[int, dict[str, list[int]]]]:
    """Of each topology the groups that were made, and the ranks that each axis joins, as its collectives find them."""
    found = []
    for topology in topologies:
        with patch.object(dist, "new_group", side_effect=dist.new_group) as made:
            mesh = build_mesh(topology, launch, torch.device("cpu"))
        axes: dict[str, list[int]] = {}
        for name in ("tp", "pp", "data", "model", "world"):
            axis: Any = getattr(mesh, name)
            here = torch.zeros(launch.world_size, dtype=torch.int64)
            here[launch.rank] = 1
            if axis.group is not None:
                dist.all_reduce(here, group=axis.group)
            axes[name] = here.nonzero().flatten().tolist()
            assert axes[name][axis.rank] == launch.rank and len(axes[name]) == axis.size
        found.append((made.call_count, axes))
    return found


def test_a_rank_makes_the_groups_that_it_uses_and_no_more() -> None:
    for rank, found in enumerate(run_ranks(sums, 4, list(MADE))):
        for (topology, most), (made, axes) in zip(MADE.items(), found, strict=True):
            assert made == most, topology
            names: dict[str, list[Any]] = {"tp": ["tp"], "pp": ["pp"], "data": ["dp", "cp"], "model": ["pp", "tp"]}
            assert axes == {
                "world": [0, 1, 2, 3],
                **{name: topology.peers(rank, joined) for name, joined in names.items()},
            }


@pytest.mark.layouts
def test_groups_that_share_ranks_are_made_without_waiting_in_a_circle() -> None:
    (topology,) = shapes = [Topology(pp=2, dp=2, tp=2)]
    for rank, ((made, axes),) in enumerate(run_ranks(sums, 8, shapes)):
        assert made == 4
        assert axes["model"] == topology.peers(rank, ["pp", "tp"])
