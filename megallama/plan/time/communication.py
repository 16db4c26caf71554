"""Seconds that collectives and messages take: a latency, and bytes over a bandwidth. Pure.

Fractions and latencies were measured with nccl on eight H200 and on four nodes of eight B200 (stas00/ml-engineering,
network/README.md): a ring reaches 80 % of NVLink; across nodes all-reduce of 16 GiB runs at 382 GB/s where eight
network cards of 50 GB/s make 400. Latencies are an all-reduce's as a host sees them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from megallama.config.schema import RunConfig
from megallama.hardware.gpus import LINK_FRACTION, Gpu
from megallama.layout.counts import padded_vocabulary
from megallama.plan.memory.state import rank_parameters
from megallama.plan.memory.traffic import Traffic
from megallama.plan.time.software import Software

NIC_FRACTION = 0.95
NODE_LATENCY = 40e-6
NETWORK_LATENCY = 380e-6
HALVES = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
"""An all-reduce is a reduce-scatter and an all-gather (arXiv 1910.02054, section 7.1)."""


@dataclass(frozen=True)
class Group:
    """Ranks that talk to each other: how many, and how far apart they are numbered."""

    size: int
    stride: int = 1

    def within_node(self, gpus_per_node: int) -> bool:
        """Whether the fast link joins all of them."""
        return (self.size - 1) * self.stride < gpus_per_node


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
    on_each_node = max(1, per_node // group.stride)
    return min(link, on_each_node * gpu.known("nic_gb_s") * 1e9 * NIC_FRACTION)


def latency(gpu: Gpu, group: Group) -> float:
    """Seconds before the first byte of an all-reduce arrives; half of them for either of its halves."""
    return NODE_LATENCY if group.within_node(int(gpu.known("gpus_per_node"))) else NETWORK_LATENCY


def collective_seconds(gpu: Gpu, group: Group, traffic: Traffic) -> float:
    """Seconds of these collectives over `group`, one after the other; 0 for a single rank."""
    if group.size == 1 or not traffic.number:
        return 0.0
    waits = sum(HALVES[kind] * number for kind, number in traffic.number.items()) / 2
    sent = sum(HALVES[kind] * size for kind, size in traffic.size.items()) * (group.size - 1) / group.size
    return waits * latency(gpu, group) + sent / ring_bandwidth(gpu, group)


def message_seconds(gpu: Gpu, stride: int, size: float) -> float:
    """Seconds of a message of `size` bytes to the rank `stride` further on.

    To another node as well a message is begun once; a collective over nodes takes so long for its many steps.
    """
    return NODE_LATENCY + size / ring_bandwidth(gpu, Group(2, stride))


def data_traffic(config: RunConfig, software: Software, parameters: int, micro_batches: int) -> Traffic:
    """Collectives of a step between data-parallel copies, of a rank that trains `parameters` before ZeRO cuts them.

    ZeRO 1 scatters gradient sums once in a step, in groups of `zero.bucket_elements` (train/gradient_sums.py), and
    gathers the weights. DeepSpeed's ZeRO 2 all-reduces in every micro-batch (zero/stage_1_and_2.py,
    allreduce_and_scatter).
    ZeRO 3 scatters in every micro-batch and gathers twice (arXiv 1910.02054, section 7), but for the weights that it
    still has, for which `stage3_max_live_parameters` are twice a bucket; a tied table as two.
    """
    zero, found, rounds = config.zero, Traffic(), micro_batches
    buckets = ceil(parameters / zero.bucket_elements)
    gradient = parameters * (2 if zero.communication_dtype == "bf16" else 4)
    element = 2 if config.train.dtype == "bf16" else 4
    summed = software.gradients
    if summed == "zero":
        summed = "all_reduce" if zero.stage == 2 else "reduce_scatter"
    found.add(summed, gradient // buckets, (rounds if zero.stage > 1 else 1) * buckets)
    if software.gradients == "all_reduce":
        return found
    if zero.stage < 3:
        found.add("all_gather", element * parameters // buckets, buckets)
        return found
    model, tp = config.model, config.parallel.tensor
    table = padded_vocabulary(model.vocab_size, tp) // tp * model.hidden_size
    # With ZeRO 3 there is no pipeline: the first rank is all.
    used = parameters + rank_parameters(config)[0].frozen + (table if model.tie_word_embeddings else 0)
    kept = min(used, 2 * zero.bucket_elements) if software.gradients == "zero" else 0
    found.add("all_gather", element * (2 * used - kept) // (2 * buckets), rounds * 2 * buckets)
    return found
