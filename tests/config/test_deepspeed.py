"""Settings reach their place in the dictionary that DeepSpeed is given."""

from __future__ import annotations

from typing import Any

import pytest

from megallama.config.deepspeed import deepspeed_config
from megallama.config.load import load_config


def dictionary(*overrides: str, dp_size: int = 1) -> dict[str, Any]:
    return deepspeed_config(load_config("configs/debug.yaml", overrides), dp_size)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_stage_of_zero(stage: int) -> None:
    assert dictionary(f"zero.stage={stage}")["zero_optimization"]["stage"] == stage


def test_the_size_of_buckets() -> None:
    zero = dictionary("zero.bucket_elements=12345")["zero_optimization"]
    sizes = {name: size for name, size in zero.items() if name.endswith("bucket_size")}
    assert sizes == dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"), 12345)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_types(dtype: str) -> None:
    found = dictionary(f"train.dtype={dtype}")
    assert found["bf16"]["enabled"] == (dtype == "bf16")
    assert found["data_types"]["grad_accum_dtype"] == "fp32"
    assert found["communication_data_type"] == "fp32"
    assert dictionary(f"zero.communication_dtype={dtype}")["communication_data_type"] == dtype


def test_the_optimizer_on_the_host() -> None:
    assert dictionary()["zero_optimization"]["offload_optimizer"]["device"] == "none"
    found = dictionary("zero.offload_optimizer=cpu")
    assert found["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": False}
    assert not found["zero_force_ds_cpu_optimizer"]


def test_the_clip() -> None:
    assert dictionary("optimizer.clip=0.25")["gradient_clipping"] == 0.25


def test_a_step_of_deepspeed_is_one_micro_batch_over_all_copies() -> None:
    found = dictionary("train.micro_batch_size=3", "train.global_batch_size=24", dp_size=4)
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["train_batch_size"] == 12
    assert (found["gradient_accumulation_steps"], found["managed_gradient_accumulation"]) == (1, False)
