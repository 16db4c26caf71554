"""The last collectives of this rank, as torch's flight recorder keeps them: what a rank that hangs waits for."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def last_collectives() -> bytes:
    """The recording of this process, a pickle that `torchfrtrace` reads; AttributeError if this torch has none.

    torch keeps the last 2,000 collectives and messages with the Python stacks that asked for them, or as many as
    TORCH_FR_BUFFER_SIZE says. On CUDA it asks the driver which of them are done, and waits as long as that does.
    """
    runtime: Any = torch._C._distributed_c10d
    # nccl has a recorder of its own, which builds without nccl do not have; what others send is in the general one.
    of_nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    dump = runtime._dump_nccl_trace if of_nccl else runtime._dump_fr_trace
    recording: bytes = dump()
    return recording
