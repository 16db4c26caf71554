from __future__ import annotations

from math import prod

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
def test_peers_differ_on_their_axes_only(topology: Topology, axes: tuple[AxisName, ...]) -> None:
    for rank in range(topology.world_size):
        peers = topology.peers(rank, axes)
        assert rank in peers and peers == sorted(set(peers))
        assert len(peers) == prod(getattr(topology, axis) for axis in axes)
        assert all(topology.peers(peer, axes) == peers for peer in peers)
        for axis in set(AXES) - set(axes):
            assert {topology.coordinate(peer, axis) for peer in peers} == {topology.coordinate(rank, axis)}


def test_tensor_parallel_ranks_are_neighbours_and_stages_are_far_apart() -> None:
    topology = Topology(pp=2, dp=2, tp=2)
    assert topology.peers(5, ["tp"]) == [4, 5]
    assert topology.peers(5, ["dp"]) == [5, 7]
    assert topology.peers(5, ["pp"]) == [1, 5]
    assert topology.peers(5, ["pp", "tp"]) == [0, 1, 4, 5]
