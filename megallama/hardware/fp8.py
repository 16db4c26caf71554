"""Whether a run that multiplies in fp8 can do so here."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from megallama.config.schema import RunConfig
from megallama.errors import UserError

CAPABILITY = (8, 9)
"""The first of CUDA with such kernels: Ada, and then Hopper."""


def check_fp8(config: RunConfig, device: torch.device) -> None:
    """UserError where torchao is not installed, or `device` has no kernels for fp8."""
    matmul = config.train.matmul
    if matmul == "dtype":
        return
    if find_spec("torchao") is None:
        raise UserError(
            f"train.matmul={matmul} needs torchao, which is not installed; install the extra `fp8`, or use "
            "train.matmul=dtype"
        )
    if matmul == "fp8" and device.type == "cpu":
        raise UserError("train.matmul=fp8 needs a GPU, and this run is on a CPU; use train.matmul=dtype")
    if matmul == "fp8" and (found := torch.cuda.get_device_capability(device)) < CAPABILITY:
        raise UserError(
            f"train.matmul=fp8 needs a GPU of compute capability 8.9 (Ada) or 9.0 (Hopper) or newer, and this one, "
            f"{torch.cuda.get_device_name(device)}, has {found[0]}.{found[1]}; use train.matmul=dtype"
        )
