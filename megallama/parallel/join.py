"""How ranks meet: at a store that rank 0 or torchrun hosts, with one verdict for all, before torch connects them.

A rank that cannot take part makes its sentence the verdict. So no rank waits in a collective for one that has left,
and none goes on with ranks that are not of its job. A signal to end ends the waiting, after some seconds.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import threading
import time
from contextlib import suppress
from datetime import timedelta

import psutil
import torch
import torch.distributed as dist

from megallama.errors import SharedError, UnreachableError, UserError
from megallama.parallel.door import answer_seconds, open_door, silent, why_silent
from megallama.parallel.launch import LOOPBACK, Launch
from megallama.system.signals import end_by_signals

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
MEETING_SECONDS = 600.0
"""The time ranks wait for each other once rank 0 has answered: some read packages and data more slowly."""
_CONNECTING = timedelta(seconds=2)
"""The time for which torch's store tries again, with a warning each, where a connection breaks."""
_LEAVING_SECONDS = 2.0
_SIGNAL_SECONDS = 5.0
_FAR_AWAY = "192.0.2.1"
"""Nobody's, by RFC 5737: the way there is the default route."""
_GO = b"go"


def join(launch: Launch, device: torch.device) -> None:
    """Make torch's process group of all ranks, where this process has none yet: gloo on CPU, nccl on CUDA.

    UserError where a rank does not come, cannot, or is not of this job.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    if launch.world_size == 1:
        # A store in memory: one process needs no port and no address.
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=COLLECTIVE_TIMEOUT)
        return
    store = _meet(launch, device)
    if launch.world_size > launch.local_world_size:
        talk_over(launch.address)
    dist.init_process_group(
        backend,
        store=store,
        rank=launch.rank,
        world_size=launch.world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )


def tell(launch: Launch, sentence: str, seconds: float) -> bool:
    """Whether rank 0 says, within `seconds`, why the job ends, for this rank, which has met nobody yet.

    It says `sentence`, unless another rank came first with its own.
    """
    deadline = time.monotonic() + seconds
    try:
        store = _of_job(launch, _connected(launch, seconds, seconds))
        if _refuse(store, sentence) is None:
            return False
        while not store.check(["said"]):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        store.add("heard", 1)
    except (UserError, RuntimeError):
        return False
    return True


def stay(launch: Launch, sentence: str, seconds: float) -> None:
    """Let the others know, for so long at most, that rank 0, which has met nobody yet, has said why the job ends.

    Where nobody ends them: srun leaves the other tasks alone unless it is told otherwise.
    """
    if dist.is_initialized():
        return
    with suppress(UserError, RuntimeError):
        store = _of_job(launch, _connected(launch, seconds, seconds))
        _refuse(store, sentence)
        _be_heard(store, launch.world_size - 1, seconds)


def _meet(launch: Launch, device: torch.device) -> dist.Store:
    """The store at which all ranks have come together. SharedError, on each, where they do not."""
    store = _of_job(launch, _connected(launch, answer_seconds(launch), MEETING_SECONDS))
    try:
        refusal = _introduce(launch, device, store) or _verdict(launch, store)
        if refusal is None:
            return dist.PrefixStore("torch", store)
        if launch.rank == 0:
            _be_heard(store, launch.world_size - 1, _LEAVING_SECONDS)
        else:
            store.add("heard", 1)
    except dist.DistError:
        raise SharedError("rank 0 has left before all ranks had met; see what it said") from None
    raise SharedError(refusal)


def _of_job(launch: Launch, store: dist.Store) -> dist.Store:
    return dist.PrefixStore(f"megallama/{launch.attempt}", store)


def _connected(launch: Launch, answer_within: float, within: float) -> dist.Store:
    """The store of the job, hosted by this process or by another. UserError where there is none in time.

    By a thread: looking up a name and waiting for a store cannot be interrupted, and signals must be.
    """
    hosts = launch.rank == 0 and not launch.hosted
    opened = launch.door is not None and launch.door.fileno() >= 0  # by now a store of before may have closed it
    search = _Search(launch, (launch.door if opened else open_door(launch)) if hosts else None)
    patience = _Patience()
    search.start()
    try:
        while not search.ended.wait(0.1):
            patience.check()
            waited, failed = time.monotonic() - search.began, time.monotonic() - search.failed
            if not search.answered and waited > answer_within:
                raise silent(launch, search.why, waited)
            if failed > answer_within or waited > within:
                raise UnreachableError(
                    f"what answers at MASTER_ADDR={launch.address!r}, MASTER_PORT={launch.port} is not rank 0 of this "
                    f"job, or has ended ({search.why}); see what rank 0 said, and give all ranks its address and a "
                    "port that nothing else uses"
                )
    finally:
        search.ended.set()
    return search.found[0]


class _Search(threading.Thread):
    """The search for the store; `door` where this process hosts it."""

    def __init__(self, launch: Launch, door: socket.socket | None) -> None:
        super().__init__(name="joining", daemon=True)
        self._launch, self._door = launch, door
        self.found: list[dist.Store] = []
        self.ended = threading.Event()
        self.answered = False
        """Whether something did, if only a rank 0 that is not ready yet: a store waits for that without end."""
        self.why = "no word"
        self.began = time.monotonic()
        self.failed = math.inf
        """When something first answered that then was no store."""

    def run(self) -> None:
        while not self.ended.is_set():
            if (why := why_silent(self._launch)) is None:
                self.answered = True
                try:
                    self.found.append(self._store())
                    self.ended.set()
                except RuntimeError as error:
                    why = str(error).splitlines()[0]
                    self.failed = min(self.failed, time.monotonic())
            if why is not None:
                self.why = why
                self.ended.wait(0.2)

    def _store(self) -> dist.Store:
        address, handle = (LOOPBACK, self._door.detach()) if self._door else (self._launch.address, None)
        store = dist.TCPStore(
            address,
            self._launch.port,
            is_master=handle is not None,
            timeout=_CONNECTING,
            wait_for_workers=False,
            master_listen_fd=handle,
        )
        store.set_timeout(COLLECTIVE_TIMEOUT)
        return store


def _introduce(launch: Launch, device: torch.device, store: dist.Store) -> str | None:
    """Say who this rank is and look whether it goes with rank 0; why not, or None. The last to come opens the job.

    UserError where the ranks are complete without this one.
    """
    node = socket.gethostname()
    store.add("here", 1)
    if store.add(f"rank/{launch.rank}", 1) > 1:
        other = store.get(f"node/{launch.rank}").decode()
        return _end(
            store,
            f"two processes are rank {launch.rank} of {launch.world_size}, on {other} and on {node}; start every rank "
            "once, and each job on a MASTER_PORT of its own",
        )
    store.set(f"node/{launch.rank}", node)
    me = [launch.world_size, device.type, node]
    if launch.rank == 0:
        store.set("first", json.dumps(me))
    elif not _wait(launch, store, "first"):
        return _verdict(launch, store)
    refusal = _unlike(launch, me, json.loads(store.get("first")))
    if refusal is None and device.type == "cuda":
        uuid = torch.cuda.get_device_properties(device).uuid
        if store.add(f"device/{uuid}", 1) > 1:
            refusal = (
                f"rank {launch.rank} would train on device {device.index} of {node}, which another rank has; start one "
                "rank for each GPU, and set LOCAL_RANK where no launcher does"
            )
    if refusal is not None:
        return _end(store, refusal)
    if store.add("met", 1) == launch.world_size:
        store.compare_set("verdict", "", _GO.decode())
    return None


def _unlike(launch: Launch, me: list[object], first: list[object]) -> str | None:
    """In which way this rank and rank 0 are not of one job."""
    (size, device, node), (first_size, first_device, first_node) = me, first
    if size != first_size:
        return (
            f"rank {launch.rank} on {node} was started with a world size of {size}, and rank 0 on {first_node} with "
            f"{first_size}; start all ranks by one command"
        )
    if device != first_device:
        cpu = node if device == "cpu" else first_node
        return (
            f"rank {launch.rank} on {node} would train on {device}, and rank 0 on {first_node} on {first_device}; see "
            f"to the GPUs of {cpu} (nvidia-smi), or set train.device=cpu for all"
        )
    return None


def _verdict(launch: Launch, store: dist.Store) -> str | None:
    """What all ranks do: go on (None), or end with the sentence that is returned."""
    _wait(launch, store, "verdict")
    verdict = store.get("verdict")
    return None if verdict == _GO else str(json.loads(verdict))


def _refuse(store: dist.Store, sentence: str) -> str | None:
    """Make `sentence` the verdict where there is none; the sentence that counts, or None where ranks have gone on."""
    verdict = store.compare_set("verdict", "", json.dumps(sentence))
    return None if verdict == _GO else str(json.loads(verdict))


def _end(store: dist.Store, sentence: str) -> str:
    """What all ranks end with; UserError with this rank's own `sentence` where the others have gone on."""
    told = _refuse(store, sentence)
    if told is None:
        raise UserError(sentence)
    return told


def _wait(launch: Launch, store: dist.Store, key: str) -> bool:
    """Wait for `key`, or for a verdict; whether `key` is there. Too long a wait becomes the verdict."""
    began, pause, patience = time.monotonic(), 0.005, _Patience()
    # A launcher of torch's has started the others, and says so where one ends.
    alone_for = answer_seconds(launch) if launch.world_size == launch.local_world_size else MEETING_SECONDS
    while not store.check([key]):
        if store.check(["verdict"]):
            return False
        patience.check()
        waited = time.monotonic() - began
        if waited > MEETING_SECONDS:
            _refuse(store, _missing(launch, store, waited))
        elif launch.rank == 0 and waited > alone_for and not launch.launcher.found and store.add("here", 0) == 1:
            _refuse(store, _alone(launch, waited))
        time.sleep(pause)
        pause = min(0.5, 1.3 * pause)
    return True


def _missing(launch: Launch, store: dist.Store, waited: float) -> str:
    missing = [rank for rank in range(launch.world_size) if not store.check([f"rank/{rank}"])]
    named = ", ".join(map(str, missing[:8])) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
    return (
        f"of {launch.world_size} ranks these have not come in {waited:.0f} s: {named}; see what they said, and whether "
        f"they reach {launch.address}:{launch.port}"
    )


def _alone(launch: Launch, waited: float) -> str:
    return (
        f"of {launch.world_size} ranks only rank 0 has come to {launch.address}:{launch.port} in {waited:.0f} s; start "
        f"the others, or unset {launch.variables} if they are left over from another job; where the others start "
        "later, set MEGALLAMA_ANSWER_SECONDS"
    )


def _be_heard(store: dist.Store, others: int, seconds: float) -> None:
    """Rank 0 hosts the store: it stays until the others know how this ends, or for so long: some may not come."""
    store.set("said", "")
    deadline = time.monotonic() + seconds
    while store.add("heard", 0) < others and time.monotonic() < deadline:
        time.sleep(0.02)


class _Patience:
    """Where a signal to end waits while this rank waits for others, for how long it still does.

    A signal that comes to all ranks is heeded after the first step, with a save; one that a launcher sends since
    another rank has failed would be held until its SIGKILL. USR1 always asks for a save.
    """

    def __init__(self) -> None:
        self._asked = math.inf

    def check(self) -> None:
        """End the process where the signal has waited too long: nothing has begun that could be saved."""
        now = time.monotonic()
        if signal.sigpending() - {signal.SIGUSR1}:
            self._asked = min(self._asked, now)
        if now - self._asked > _SIGNAL_SECONDS:
            end_by_signals()


def talk_over(address: str) -> None:
    """Let gloo talk over the interface that leads to `address`, unless GLOO_SOCKET_IFNAME says which.

    It would take that of this machine's own name, which many systems give to loopback: no other node is there.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    own = _address_towards(address)
    if own.startswith("127.") and not address.startswith("127."):  # the name is this machine's own
        own = _address_towards(_FAR_AWAY) or own
    for name, addresses in psutil.net_if_addrs().items():
        if own in (found.address for found in addresses):
            os.environ["GLOO_SOCKET_IFNAME"] = name


def _address_towards(address: str) -> str:
    """This machine's own on the way there; empty where there is none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 1))  # sends nothing, and chooses a route
        except (OSError, UnicodeError):
            return ""  # joining will say it better
        own: str = probe.getsockname()[0]
        return own
