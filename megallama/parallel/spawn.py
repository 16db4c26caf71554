"""Ranks as processes of this machine: the way in for `megallama verify` and the tests.

Ranks are forked from one server process that has imported torch and deepspeed once; without it each would take seconds
and gigabytes of reading to start.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, TypeVar

from megallama.parallel.launch import LOOPBACK, Launch

R = TypeVar("R")


class RankFailedError(RuntimeError):
    """A rank raised, died or did not answer in time; the message holds its traceback."""


def run_ranks(
    function: Callable[..., R], world_size: int, *arguments: object, log: Path | None = None, timeout: float = 240.0
) -> list[R]:
    """Call `function(launch, *arguments)` on every rank of a new world on CPU; the results in rank order.

    `function`, its arguments and results cross processes by pickle. What a rank prints goes to `log`, or nowhere. One
    rank's failure ends the others. RankFailedError if a rank fails, or after `timeout` seconds.
    """
    context = _context()
    # Open from here on, and handed to the first rank: a port that is only known to be free may be taken meanwhile.
    door = socket.create_server((LOOPBACK, 0))
    links, processes = [], []
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        call = pickle.dumps((function, arguments))
        place = rank, world_size, door.getsockname()[1], door if rank == 0 else None
        process = context.Process(target=_rank, args=(call, theirs, *place, log), daemon=True)
        process.start()
        theirs.close()
        links.append(ours)
        processes.append(process)
    door.close()
    try:
        return _collect(links, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(links: Sequence[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(links):
        pending = [link for rank, link in enumerate(links) if rank not in results]
        ready = wait(pending, timeout)
        if not ready:
            silent = [rank for rank in range(len(links)) if rank not in results]
            raise RankFailedError(f"ranks {silent} did not answer within {timeout:.0f} s")
        for link in ready:
            rank = links.index(link)
            try:
                failed, content = pickle.loads(links[rank].recv_bytes())
            except EOFError:
                raise RankFailedError(f"rank {rank} died without a word") from None
            if failed:
                raise RankFailedError(f"rank {rank} failed:\n{content}")
            results[rank] = content
    return [results[rank] for rank in range(len(links))]


def _rank(
    call: bytes,
    link: Connection,
    rank: int,
    world_size: int,
    port: int,
    door: socket.socket | None,
    log: Path | None,
) -> None:
    import torch

    gc.freeze()  # the first collection would copy every page of the server: 0.3 s of a rank
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    with Path(log or os.devnull).open("a", buffering=1) as sink, redirect_stdout(sink), redirect_stderr(sink):
        try:
            function, arguments = pickle.loads(call)
            launch = Launch(rank, rank, world_size, world_size, port=port, door=door)
            answer = (False, function(launch, *arguments))
        except BaseException:
            answer = (True, traceback.format_exc())
            print(answer[1])
    link.send_bytes(pickle.dumps(answer))
    link.close()
    # Leaving in order would run destructors of process groups whose peers may be gone.
    os._exit(0)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    os.environ["DS_ACCELERATOR"] = "cpu"  # deepspeed looks for a device when the server imports it
    # The second is what deepspeed imports only when it is set up, and with it torch's compiler: seconds for each rank.
    context.set_forkserver_preload(["megallama.train.loop", "deepspeed.runtime.zero.muon.muon_optimizer"])
    return context
