"""The way into training for every launcher: from a config to ranks that have met and agree.

Everything a user can get wrong is found here, before the process groups exist and before anything is written.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megallama.checkpoint.state import data_identity, seen_before
from megallama.config.schema import RunConfig
from megallama.layout.check import check_training
from megallama.layout.frozen import checkpoint_bytes
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.run_dir.limits import check_limits, check_run_dir
from megallama.run_dir.trackers import check_trackers

if TYPE_CHECKING:
    from megallama.train.run import Finished


def start(config: RunConfig, launch: Launch) -> Finished:
    """Train `config` as the rank that `launch` says, until the run or this start of it has ended.

    UserError, raised by every rank alike and before anything is written, for what a user can mend; later, and on one
    rank alone, where that has too little memory.
    """
    seen = seen_before(config)
    batching = check_training(config, launch.world_size, seen)
    save_bytes = checkpoint_bytes(config)
    topology = Topology(dp=batching.dp_size, **config.parallel.sizes)
    check_limits(launch.world_size, save_bytes // launch.world_size)
    check_run_dir(Path(config.run.dir), save_bytes)
    if launch.rank == 0:
        check_trackers(config)
    # torch, which the above does without: it is said at once, and a small `ulimit -v` leaves no room for torch.
    with _imports():
        import torch

        from megallama.checkpoint.reading.store import pick_start
        from megallama.data.loader import open_data
        from megallama.hardware.compiler import check_compiler
        from megallama.hardware.fp8 import check_fp8
        from megallama.model.attention import use_fastest_kernel
        from megallama.parallel.agreement import check_same, facts_of
        from megallama.parallel.join import join
        from megallama.parallel.mesh import build_mesh, driver_versions, pick_device

    data = open_data(config, topology, launch.rank, seen)
    device = pick_device(config.train.device, launch.local_rank, own=launch.by_tasks)
    check_fp8(config, device)
    check_compiler(config, device)
    launch.prepare(device)
    if config.zero.offload_optimizer == "cpu" and device.type == "cuda":
        # Launchers give the ranks of GPUs one thread each, with which an update on the host takes many times as long.
        torch.set_num_threads(max(launch.processors, torch.get_num_threads()))
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory that it has not written, and filling all of it first takes time.
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = False
    elif device.type == "cuda":
        use_fastest_kernel(device)
    # torch 2.13 renames collectives that 2.11 knows by their old names only; DeepSpeed and we use the old ones.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r"barrier\(\): using the device", UserWarning)  # it is the one that is set
    pick = partial(pick_start, config, partial(data_identity, config, data.train.fingerprint))
    pick()  # each rank for itself: what a user can mend is said before any waits for another
    facts = facts_of(config, data.contents | driver_versions(device))
    join(launch, device)
    check_same(facts, device)  # before the groups: ranks of another layout would make others, and wait for ever
    mesh = build_mesh(topology, launch, device)

    # deepspeed is imported when the environment that it reads is prepared.
    with _imports():
        from megallama.train.loop import train

    return train(config, mesh, data, launch)


@contextmanager
def _imports() -> Iterator[None]:
    """Import without looking for garbage, now or later, among half a million objects that stay: 0.8 s of a start."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
