from __future__ import annotations

import pytest

from megallama.layout.topology import AXES, AxisName, Topology

SHAPES = [Topology(), Topology(tp=4), Topology(pp=2, dp=3, cp=2, tp=2), Topology(pp=4, dp=2)]


@pytest.mark.parametrize("topology", SHAPES)
def test_rank_and_coordinates_are_inverse(topology: Topology) -> None:
    for rank in range(topology.world_size):
        place = {axis: topology.coordinate(rank, axis) for axis in AXES}
        assert topology.rank(**place) == rank


@pytest.mark.parametrize("topology", SHAPES)
@pytest.mark.parametrize("axes", [("tp",), ("dp",), ("pp",), ("dp", "cp"), ("pp", "tp")])
def test_groups_part_all_ranks_by_the_other_coordinates(topology: Topology, axes: tuple[AxisName, ...]) -> None:
    groups = topology.groups(axes)
    assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size))
    for group in groups:
        held = {tuple(topology.coordinate(rank, axis) for axis in AXES if axis not in axes) for rank in group}
        assert len(held) == 1


def test_tensor_parallel_ranks_are_neighbours_and_stages_are_far_apart() -> None:
    topology = Topology(pp=2, dp=2, tp=2)
    assert topology.groups(["tp"]) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert topology.groups(["dp"]) == [[0, 2], [1, 3], [4, 6], [5, 7]]
    assert topology.groups(["pp"]) == [[0, 4], [1, 5], [2, 6], [3, 7]]
    assert topology.groups(["pp", "tp"]) == [[0, 1, 4, 5], [2, 3, 6, 7]]
