"""The way into training for every launcher: what has to happen before deepspeed is imported."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from megallama.checkpoint.state import seen_before
from megallama.config.schema import RunConfig
from megallama.layout.check import check_training
from megallama.parallel.launch import Launch
from megallama.run_dir.limits import check_limits

if TYPE_CHECKING:
    from megallama.train.run import Finished


def start(config: RunConfig, launch: Launch) -> Finished:
    """Train `config` as the rank that `launch` says, until the run or this start of it has ended.

    UserError, raised by every rank alike and before anything is written, for what a user can mend; later, and on one
    rank alone, where that has too little memory.
    """
    batching = check_training(config, launch.world_size, seen_before(config))
    check_limits(config, launch.world_size)
    from megallama.parallel.mesh import pick_device

    device = pick_device(config.train.device, launch.local_rank, own=launch.by_tasks)
    launch.prepare(device)
    # torch 2.13 renames collectives that 2.11 knows by their old names only; DeepSpeed and we use the old ones.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)

    from megallama.train.loop import train

    return train(config, batching, launch, device)
