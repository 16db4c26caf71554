"""The DeepSpeed dictionary that a run becomes: a pure function, shown by `megallama config`, never written by hand."""

from __future__ import annotations

from typing import Any

from megallama.config.schema import RunConfig


def deepspeed_config(config: RunConfig, ranks: int) -> dict[str, Any]:
    """What `deepspeed.initialize` is given; ZeRO cuts over `ranks`, which are dp * cp.

    Accumulation is unmanaged: backward only adds up, and each `engine.step()` is an optimizer step, so that any
    schedule of forwards and backwards can drive it. DeepSpeed therefore counts one step as one micro-batch, whatever
    the gradient accumulation of the run.
    """
    bf16 = config.train.dtype == "bf16"
    bucket = config.zero.bucket_elements
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "train_batch_size": config.train.micro_batch_size * ranks,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.optimizer.clip,
        # The norm tells of a gradient that is not finite: another pass over all of them would find no more.
        "bf16": {"enabled": bf16, "check_grad_overflow": False},
        # The default would accumulate in the type of the model: a silent loss of gradient in bf16.
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": config.zero.communication_dtype,
        "zero_optimization": {
            "stage": config.zero.stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            # By default stage 3 keeps the last half billion weights from forward to backward, 1 GB just where memory
            # is fullest, for a fourteenth of what a 7B model gathers.
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 2 * bucket,
            # Stage 1 accumulates in place: a contiguous copy of every gradient would buy it nothing.
            "contiguous_gradients": config.zero.stage > 1,
            # Only stage 2 can overlap in unmanaged mode; its gain is small and it holds one more bucket.
            "overlap_comm": False,
            # Pinned memory would be faster, and comes in powers of two: up to twice what is needed.
            "offload_optimizer": {"device": config.zero.offload_optimizer, "pin_memory": False},
        },
        # torch's own AdamW: DeepSpeed's would be compiled at start.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
        "wall_clock_breakdown": False,
        # Its clock waits for the device before every forward and after every step.
        "timers": {"throughput": {"enabled": False}},
    }
