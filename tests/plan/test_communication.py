"""Seconds of collectives: the measurements that the constants are from, and the ways out of a node."""

from __future__ import annotations

import pytest

from megallama.errors import UserError
from megallama.plan.hardware import built_in_hardware
from megallama.plan.time.communication import Group, collective_seconds, message_seconds, ring_bandwidth

GIB = 1 << 30
HARDWARE = built_in_hardware()


@pytest.mark.parametrize(
    ("gpu", "ranks", "payload", "bus"),
    [
        ("b200", 32, GIB // 16, 157e9),
        ("b200", 32, GIB, 362e9),
        ("b200", 32, 16 * GIB, 382e9),
        ("h200", 8, GIB // 64, 220e9),
        ("h200", 8, GIB // 16, 347e9),
    ],
)
def test_all_reduces_take_what_was_measured(gpu: str, ranks: int, payload: int, bus: float) -> None:
    """Measured with nccl: stas00/ml-engineering, network/README.md. Rings; a switch that adds up is faster."""
    sent = 2 * (ranks - 1) / ranks * payload
    assert collective_seconds(HARDWARE[gpu], Group(ranks), sent, 1) == pytest.approx(sent / bus, rel=0.3)


def test_a_ring_leaves_a_node_by_as_many_cards_as_it_has_ranks_there() -> None:
    h100 = HARDWARE["h100-80g"]
    assert ring_bandwidth(h100, Group(8)) == pytest.approx(0.8 * 450e9)
    assert ring_bandwidth(h100, Group(16, stride=8)) == pytest.approx(0.95 * 50e9)
    assert ring_bandwidth(h100, Group(16, stride=4)) == pytest.approx(2 * 0.95 * 50e9)
    assert ring_bandwidth(h100, Group(16, stride=16)) == pytest.approx(0.95 * 50e9)
    assert ring_bandwidth(h100, Group(2, stride=4)) == pytest.approx(0.8 * 450e9)


def test_the_slower_of_link_and_cards_is_the_limit() -> None:
    gpu = HARDWARE["h100-80g"].model_copy(update={"node_link_gb_s": 63})
    assert ring_bandwidth(gpu, Group(64)) == pytest.approx(0.8 * 63e9)


def test_one_rank_communicates_nothing_and_asks_for_no_bandwidth() -> None:
    assert collective_seconds(HARDWARE["cpu"], Group(1), 1e9) == 0
    with pytest.raises(UserError, match=r"cpu\.gpus_per_node is not known"):
        collective_seconds(HARDWARE["cpu"], Group(2), 1e9)


def test_messages_to_another_node_take_longer() -> None:
    h100 = HARDWARE["h100-80g"]
    near, far = (message_seconds(h100, stride, 1e8, 2) for stride in (4, 8))
    assert near == pytest.approx(2 * 40e-6 + 2e8 / 360e9)
    assert far == pytest.approx(2 * 40e-6 + 2e8 / 47.5e9)
