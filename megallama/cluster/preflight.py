"""A look at a node before it trains: `srun --ntasks-per-node=1 python -m megallama.cluster.preflight ...`.

Each node says what it found in one line of JSON; `megallama.cluster.verdict` makes the verdict. What may hang or end
the process that tries it, a device or a network, is tried in a process of its own with a time limit.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import psutil
import torch
import torch.distributed as dist

from megallama.cluster.verdict import CANNOT_REACH, Link, Report
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.frozen import checkpoint_bytes
from megallama.parallel.join import talk_over
from megallama.parallel.mesh import pick_device
from megallama.run_dir.limits import check_run_dir

PACKAGES = ("megallama", "torch", "deepspeed", "numpy")
LEAST_FREE = 0.9
"""The least share of a device's memory that is free where no process of another job is left."""
LEAST_TEMPORARY_BYTES = 1 << 26
MEETING_SECONDS = 180
"""The time nodes wait for each other: they read the same packages from one file system."""
TRIAL_SECONDS = 60
ALL_REDUCE_BYTES = 1 << 26
_MATMUL = 8192

R = TypeVar("R")


@dataclass(frozen=True)
class Place:
    """This node among those of the job."""

    node: str
    rank: int
    names: tuple[str, ...]
    """The names of all nodes, by their rank."""
    address: str
    """The address of the first node."""
    port: int
    gpus: int
    """The number that Slurm says it has."""


def examine(config: RunConfig, place: Place, ranks: int, token: Path) -> Report:
    """Everything that is looked at, on a node that will run that many ranks. `token` is a file that all must see."""
    sees = token.exists()
    errors = [] if sees else [f"it cannot see {token}, which the first node wrote"]
    errors += list(_host_errors(config, ranks, len(place.names) * ranks)) if sees else []
    flops: list[float] = []
    try:
        flops = tried(_devices, config, ranks, place.gpus)
    except (UserError, RuntimeError) as error:
        errors.append(str(error).splitlines()[0])
    clock, links = None, []
    if len(place.names) > 1:
        try:
            store, clock = _meet(place)
        except RuntimeError:
            return Report(place.node, [*errors, f"{CANNOT_REACH} {place.address}:{place.port}"], sees, _versions())
        links = list(_links(store, place, config, able=not errors))
        _leave(store, place)
    return Report(place.node, errors, sees, _versions(), clock, flops, links)


def _host_errors(config: RunConfig, ranks: int, world_size: int) -> Iterator[str]:
    try:
        check_run_dir(Path(config.run.dir), checkpoint_bytes(config))
    except UserError as error:
        yield str(error)
    needed = checkpoint_bytes(config) / world_size * ranks
    memory = psutil.virtual_memory().available
    if memory < needed:
        yield f"it has {memory / 1e9:.2f} GB of free memory, and the copies for a save take {needed / 1e9:.2f} GB"
    temporary = Path(os.environ.get("TMPDIR", "/tmp"))
    if not temporary.is_dir() or shutil.disk_usage(temporary).free < LEAST_TEMPORARY_BYTES:
        yield f"its temporary folder {temporary} is missing or has less than {LEAST_TEMPORARY_BYTES >> 20} MiB left"


def _devices(config: RunConfig, ranks: int, gpus: int) -> list[float]:
    """FLOP/s of each device; none on a CPU. UserError or RuntimeError where one is missing, taken or broken."""
    if pick_device(config.train.device, ranks - 1).type == "cpu":
        if gpus and config.train.device != "cpu":
            raise UserError(f"Slurm gave it {gpus} GPUs, and CUDA finds none; see to the driver")
        return []
    return [_device_flops(number) for number in range(ranks)]


def _device_flops(number: int) -> float:
    """FLOP/s of a bf16 matmul on a CUDA device, the best of some, whose result is looked at as well."""
    device = torch.device("cuda", number)
    free, total = torch.cuda.mem_get_info(device)
    if free < LEAST_FREE * total:
        raise UserError(f"device {number} has {free / total:.0%} of its memory free: something else runs there")
    ones = torch.ones(_MATMUL, _MATMUL, dtype=torch.bfloat16, device=device)
    product, best = ones @ ones, float("inf")
    until = time.perf_counter() + 1.0  # clocks rise with the first work
    while time.perf_counter() < until:
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        torch.matmul(ones, ones, out=product)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    if not bool((product == _MATMUL).all()):
        raise UserError(f"device {number} computes wrong: a product of ones is not what it must be")
    return 2 * _MATMUL**3 / best


def _meet(place: Place) -> tuple[dist.TCPStore, float | None]:
    """The store at which all nodes meet, and this node's clock minus the first one's.

    The clock is None on a node that came when the others had gone on. RuntimeError where it cannot come at all.
    """
    store = _store(place, is_first=place.rank == 0)
    store.set(f"here/{place.rank}", "")
    if place.rank == 0:
        _wait_for(place, lambda other: store.check([f"here/{other}"]), MEETING_SECONDS)
        store.set("go", repr(time.time()))
    late = place.rank > 0 and store.check(["go"])
    store.wait(["go"], timedelta(seconds=2 * MEETING_SECONDS))
    now = time.time()
    return store, None if late else now - float(store.get("go"))


def _store(place: Place, *, is_first: bool) -> dist.TCPStore:
    timeout = timedelta(seconds=MEETING_SECONDS)
    return dist.TCPStore(place.address, place.port, is_master=is_first, timeout=timeout, wait_for_workers=False)


def _leave(store: dist.TCPStore, place: Place) -> None:
    """The first node holds the store and leaves last."""
    try:
        store.set(f"left/{place.rank}", "")
        if place.rank == 0:
            gone = 4 * TRIAL_SECONDS
            _wait_for(place, lambda n: not store.check([f"here/{n}"]) or store.check([f"left/{n}"]), gone)
    except RuntimeError:
        return  # the others have what they came for


def _wait_for(place: Place, what: Callable[[int], bool], seconds: float) -> None:
    """Until it is true of every other node, or too late."""
    deadline = time.monotonic() + seconds
    while not all(map(what, range(1, len(place.names)))) and time.monotonic() < deadline:
        time.sleep(0.1)


def _links(store: dist.TCPStore, place: Place, config: RunConfig, *, able: bool) -> Iterator[Link]:
    """An all-reduce with the node before and the node behind in a ring, all nodes at once, in three rounds of pairs.

    Nodes that did not come, or are not `able`, are left out: what fails with them is no fault of their neighbours.
    """
    size = len(place.names)
    try:
        store.set(f"able/{place.rank}", "yes" if able else "no")
        for number, first in enumerate(first_of_pair(place.rank, size)):
            other = -1 if first is None else first if place.rank != first else (first + 1) % size
            if first is None or not store.check([f"here/{other}"]):
                continue
            store.set(f"ready/{number}/{place.rank}", "")
            store.wait([f"able/{other}", f"ready/{number}/{other}"], timedelta(seconds=(number + 1) * TRIAL_SECONDS))
            if able and store.get(f"able/{other}") == b"yes":
                yield Link(place.names[other], _bandwidth(place, config, number, first))
    except RuntimeError as error:
        print(f"the look at links ends: {error}", file=sys.stderr)


def first_of_pair(rank: int, size: int) -> list[int | None]:
    """In each round, the lower rank of the pair (n, n + 1) that `rank` is in, or None; n + 1 of the last is the first.

    Together the pairs are a ring: each node has two neighbours, where there are three nodes or more.
    """
    even, odd = rank - rank % 2, rank - 1 + rank % 2
    rounds = [even if even + 1 < size else None, odd if odd >= 0 and odd + 1 < size else None]
    closing = size - 1 if rank in (0, size - 1) and size > 2 else None
    return [*rounds, closing]


def _bandwidth(place: Place, config: RunConfig, number: int, first: int) -> float:
    """Bytes/s of the all-reduce of a pair, 0 where it fails."""
    try:
        return tried(_all_reduce, place, config.train.device, f"pair/{number}/{first}", int(place.rank != first))
    except (UserError, RuntimeError) as error:
        print(f"all-reduce in round {number} of {place.node}: {error}", file=sys.stderr)
        return 0.0


def _all_reduce(place: Place, wanted: str, prefix: str, rank: int) -> float:
    device = pick_device(wanted, 0)
    store = dist.PrefixStore(prefix, _store(place, is_first=False))
    backend, limit = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=TRIAL_SECONDS)
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=limit)
    data = torch.ones(ALL_REDUCE_BYTES // 4, device=device)
    seconds = []
    for _ in range(4):  # the first makes the connections
        began = time.perf_counter()
        dist.all_reduce(data)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return ALL_REDUCE_BYTES / min(seconds[1:])


def tried(function: Callable[..., R], *arguments: object) -> R:
    """What `function` returns, in a process of its own; UserError if it raises one, RuntimeError for all else."""
    context = multiprocessing.get_context("fork")  # nothing here has touched a device
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(TRIAL_SECONDS):
            raise RuntimeError(f"{function.__name__.strip('_')}: no answer in {TRIAL_SECONDS} s")
        result = ours.recv()
    except EOFError:
        raise RuntimeError(f"{function.__name__.strip('_')}: the process that tried it ended") from None
    finally:
        process.kill()
        process.join(1)
    if isinstance(result, UserError):
        raise result
    if isinstance(result, Exception):
        raise RuntimeError(f"{function.__name__.strip('_')}: {result}")
    found: R = result
    return found


def _send(to: Connection, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
    try:
        result: object = function(*arguments)
    except UserError as error:
        result = error
    except Exception as error:  # whatever a broken device or network raises
        result = RuntimeError(str(error))
    to.send(result)
    os._exit(0)  # in order would wait for what a broken device still does


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def main() -> None:
    """Examine the node that Slurm runs this on and print what was found."""
    parser = argparse.ArgumentParser(prog="megallama.cluster.preflight", description=__doc__)
    parser.add_argument("--address", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--ranks-per-node", type=int, required=True)
    parser.add_argument("--token", type=Path, required=True)
    parser.add_argument("--nodes", required=True, help="their names, comma-separated, the first one first")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    node, rank = os.environ["SLURMD_NODENAME"], int(os.environ["SLURM_NODEID"])
    gpus = int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
    place = Place(node, rank, tuple(options.nodes.split(",")), options.address, options.port, gpus)
    with redirect_stdout(sys.stderr):
        try:
            talk_over(options.address)
            config = load_config(options.config, options.overrides)
            report = examine(config, place, options.ranks_per_node, options.token)
        except Exception as error:  # a node that cannot even look says so, by name
            report = Report(node, [f"the look at it failed: {type(error).__name__}: {error}"])
    print(report.line(), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
