"""What crosses the data-parallel ranks in one optimizer step. Pure."""

from __future__ import annotations

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
