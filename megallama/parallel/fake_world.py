"""One rank of a world whose other ranks are not there: a model of any layout runs in one process, without values.

torch's fake process group has any size, and each collective answers at once with what lies in the memory it is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from megallama.layout.topology import AxisName, Topology
from megallama.parallel.mesh import Axis


@contextmanager
def fake_world(world_size: int, rank: int) -> Iterator[None]:
    """As `rank` of so many; not inside a job."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # it brings the backend with it

    assert not dist.is_initialized()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with warnings.catch_warnings():
            # torch 2.13 renames the collectives that torch 2.11 has under these names alone.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        dist.destroy_process_group()


def fake_axis(topology: Topology, rank: int, name: AxisName) -> Axis:
    """This rank's group along an axis, called as the axis; the others' are not needed, since nobody answers."""
    mine = topology.peers(rank, [name])
    group = dist.new_group(mine, group_desc=name) if len(mine) > 1 else None
    return Axis(group, mine.index(rank), len(mine))
