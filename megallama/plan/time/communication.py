"""Seconds that collectives and messages take: a latency, and bytes over a bandwidth. Pure.

Fractions and latencies were measured with nccl on eight H200 and on four nodes of eight B200 (stas00/ml-engineering,
network/README.md): a ring reaches 80 % of NVLink; across nodes all-reduce of 16 GiB runs at 382 GB/s where eight
network cards of 50 GB/s make 400. Latencies are an all-reduce's as a host sees them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megallama.plan.hardware import Gpu

LINK_FRACTION = 0.80
NIC_FRACTION = 0.95
NODE_LATENCY = 40e-6
NETWORK_LATENCY = 380e-6


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other: how many, and how far apart they are numbered."""

    size: int
    stride: int = 1

    def within_node(self, gpus_per_node: int) -> bool:
        """Whether the fast link joins all of them."""
        return (self.size - 1) * self.stride < gpus_per_node

    def on_each_node(self, gpus_per_node: int) -> int:
        """The number of them on one node."""
        return max(1, gpus_per_node // self.stride)


def ring_bandwidth(gpu: Gpu, group: Group) -> float:
    """Bytes per second that rings over `group` move through each rank.

    Each rank on a node begins a ring of its own, which leaves by that rank's network card; the link within the node is
    the limit where it is slower. UserError where a bandwidth of `gpu` is not known.
    """
    per_node = int(gpu.known("gpus_per_node"))
    if per_node == 1:
        return gpu.known("nic_gb_s") * 1e9 * NIC_FRACTION
    link = gpu.known("node_link_gb_s") * 1e9 * LINK_FRACTION
    if group.within_node(per_node):
        return link
    return min(link, group.on_each_node(per_node) * gpu.known("nic_gb_s") * 1e9 * NIC_FRACTION)


def latency(gpu: Gpu, group: Group) -> float:
    """Seconds before the first byte of a collective arrives."""
    return NODE_LATENCY if group.within_node(int(gpu.known("gpus_per_node"))) else NETWORK_LATENCY


def collective_seconds(gpu: Gpu, group: Group, sent: float, count: float = 1) -> float:
    """Seconds of `count` collectives in which each rank sends `sent` bytes together; 0 for a single rank."""
    if group.size == 1:
        return 0.0
    return count * latency(gpu, group) + sent / ring_bandwidth(gpu, group)


def message_seconds(gpu: Gpu, stride: int, size: float, count: float = 1) -> float:
    """Seconds of `count` messages of `size` bytes to the rank `stride` further on, one after the other.

    To another node as well a message is begun once; a collective over nodes takes so long for its many steps.
    """
    return count * (NODE_LATENCY + size / ring_bandwidth(gpu, Group(2, stride)))
