"""Seconds that collectives and messages take: a latency, and bytes over a bandwidth. Pure.

Fractions and latencies were measured with nccl on eight H200 and on four nodes of eight B200 (stas00/ml-engineering,
network/README.md): a ring reaches 80 % of NVLink; across nodes all-reduce of 16 GiB runs at 382 GB/s where eight
network cards of 50 GB/s make 400. Latencies are an all-reduce's as a host sees them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megallama.plan.hardware import Gpu
from megallama.plan.time.workload import Workload


def data_traffic(work: Workload, parameters: float) -> dict[str, float]:
    """Bytes of whole messages by kind of collective, of a rank that holds `parameters` before ZeRO cuts them.

    DeepSpeed's ZeRO 1 all-reduces gradient sums, though a rank needs its part of them only, and gathers the weights
    (runtime/bf16_optimizer.py). ZeRO 2 all-reduces in every micro-batch (zero/stage_1_and_2.py, allreduce_and_scatter).
    ZeRO 3 scatters in every micro-batch and gathers twice (arXiv 1910.02054, section 7), but for the weights that it
    still has, for which `stage3_max_live_parameters` are twice a bucket; a tied table as two.
    """
    gradient, weight = work.gradient_bytes * parameters, work.element_bytes * parameters
    m, shape = work.micro_batches, work.shape
    used = parameters + (shape.head / work.tp if shape.tied else 0)
    gathered = work.element_bytes * (2 * used - min(used, 2 * work.bucket_elements))
    by_scheme = {
        "all-reduce": {"all_reduce": gradient},
        "sharded optimizer": {"reduce_scatter": gradient, "all_gather": weight},
        "zero1": {"all_reduce": gradient, "all_gather": weight},
        "zero2": {"all_reduce": m * gradient, "all_gather": weight},
        "zero3": {"reduce_scatter": m * gradient, "all_gather": m * gathered},
    }
    return by_scheme[work.data]


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
