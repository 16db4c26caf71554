"""GPUs for days as training FLOPs."""

from __future__ import annotations

import pytest

from megallama.errors import UserError
from megallama.plan.sizing.flags import DEFAULT_GPU, Compute, peak_flops


def test_the_gpu_hours_of_llama_2_7b_at_its_mfu_are_its_compute() -> None:
    """184,320 GPU-hours on A100s at 0.391 of the peak, for 6 * 6.738e9 * 2e12 (model card of Llama 2)."""
    compute = Compute(gpus=1024, days=184_320 / 1024 / 24, gpu="a100-80g", peak=312e12, mfu=0.391)
    assert compute.flops == pytest.approx(6 * 6_738_415_616 * 2e12, rel=3e-3)


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [("a100-40g", 312e12), ("h100", 989.4e12), ("H100-80G", 989.4e12), ("h100-pcie", 756e12), ("h100-nvl", 835e12),
     ("h200", 989.4e12), ("gh200", 989.4e12), ("b200", 2250e12), ("mi300x", 1307e12), ("l40s", 362e12)],
)  # fmt: skip
def test_published_peaks_by_short_name(gpu: str, peak: float) -> None:
    assert peak_flops(gpu) == peak


def test_the_default_gpu_is_known() -> None:
    assert peak_flops(DEFAULT_GPU) == 989.4e12


@pytest.mark.parametrize(
    ("gpu", "fix"), [("h100-80", "did you mean h100-80g"), ("tpu-v5p", "known: "), ("", "known: ")]
)
def test_an_unknown_gpu_has_no_guessed_peak(gpu: str, fix: str) -> None:
    with pytest.raises(UserError) as refused:
        peak_flops(gpu)
    assert str(refused.value).startswith(f"the GPU {gpu} is not known; {fix}")
