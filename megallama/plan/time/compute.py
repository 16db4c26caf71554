"""The training compute of some GPUs in some days. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SECONDS_PER_DAY = 86_400
DEFAULT_GPU = "h100-80g"
# 6 * parameters * tokens a second over the dense bf16 peak. By this count published runs reached 0.37 to 0.51 on A100s
# (model card of Llama 2, README of TinyLlama) and 0.21 to 0.33 on H100s of 500 W (benchmarks of torchtitan); with
# attention counted as well, 0.41 to 0.48 on H100s of 700 W (README of Megatron-LM).
DEFAULT_MFU = 0.4


@dataclass(frozen=True)
class Compute:
    """`gpus` for `days`, each doing `mfu` * `peak` FLOP/s of 6 * parameters * tokens; attention is left out of it."""

    gpus: int
    days: float
    gpu: str
    peak: float
    mfu: float

    @property
    def flops(self) -> float:
        """Training FLOPs."""
        return self.gpus * self.days * SECONDS_PER_DAY * self.peak * self.mfu


def peak_flops(gpu: str, hardware: Path | None = None) -> float:
    """Dense bf16 FLOP/s of a GPU by its short name, such as h100-80g; UserError for one that is not known.

    `hardware` is a file that adds to those that are.
    """
    # pydantic and YAML take a quarter of a second, which sizing without GPUs need not wait for.
    from megallama.plan.hardware import find_gpu, load_hardware

    return find_gpu(gpu, load_hardware(hardware)).known("peak_tflops") * 1e12
