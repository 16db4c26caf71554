"""Where ranks meet, before torch is there: rank 0 listens on a port, the others find out whether it answers.

Rank 0 opens its door as its first act. So a port that is taken is told before anything is imported, and an address
that answers nothing is known to be wrong: a rank 0 whose imports take minutes has answered long before.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from contextlib import suppress

from megallama.errors import UnreachableError, UserError
from megallama.parallel.launch import Launch

ANSWER_SECONDS = 20.0
"""The time a rank waits for rank 0's port to answer: the ranks of a job may be started that far apart."""
_LEAST_SECONDS = 10.0
"""Also where a rank has been slow until here."""
_BACKLOG = 4096
_ATTEMPT_SECONDS = 5.0
_TAKEN = (errno.EADDRINUSE, errno.EACCES)


def answer_seconds(launch: Launch) -> float:
    """How much longer to wait for a port to answer; UserError where MEGALLAMA_ANSWER_SECONDS is no number of seconds.

    ANSWER_SECONDS, or what that variable says, count from the beginning of the process.
    """
    said, seconds = os.environ.get("MEGALLAMA_ANSWER_SECONDS") or str(ANSWER_SECONDS), 0.0
    with suppress(ValueError):
        seconds = float(said)
    if not 0 < seconds < 1e6:
        fix = f"use {ANSWER_SECONDS:.0f}, or unset it"
        raise UserError(f"MEGALLAMA_ANSWER_SECONDS={said!r} is not a number of seconds above 0; {fix}")
    return max(min(seconds, _LEAST_SECONDS), seconds - (time.monotonic() - launch.began))


def open_door(launch: Launch) -> socket.socket | None:
    """The listening socket of rank 0; None on other ranks and where the launcher hosts the meeting.

    UserError where the port is taken.
    """
    if launch.world_size == 1 or launch.rank != 0 or launch.hosted:
        return None
    try:
        return _listen(launch.port)
    except OSError as error:
        free = next((port for port in range(launch.port + 1, launch.port + 100) if _is_free(port)), None)
        fix = "use another" if free is None else f"port {free} is free"
        why = os.strerror(error.errno or 0)
        raise UserError(
            f"port {launch.port}, where the ranks are to meet, cannot be had on this machine ({why}); end what holds "
            f"it, or give another ({fix}): MASTER_PORT=, or --master_port= of deepspeed"
        ) from None


def _listen(port: int) -> socket.socket:
    """On every address of this machine, as a store of torch's does."""
    try:
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
    except (OSError, ValueError) as error:  # a machine may have no IPv6
        if isinstance(error, OSError) and error.errno in _TAKEN:
            raise
        return socket.create_server(("", port), backlog=_BACKLOG)


def _is_free(port: int) -> bool:
    with suppress(OSError, OverflowError), _listen(port):
        return True
    return False


def why_silent(launch: Launch) -> str | None:
    """Why nothing answers at the address where ranks meet, or None where something does; in seconds.

    A name that is looked up may take much longer.
    """
    try:
        with socket.create_connection((launch.address, launch.port), timeout=_ATTEMPT_SECONDS):
            return None
    except socket.gaierror as error:
        return f"the name does not resolve: {error.strerror}"
    except TimeoutError:
        return "no answer"
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)


def silent(launch: Launch, why: str, seconds: float) -> UnreachableError:
    """The sentence on an address that answers nothing."""
    return UnreachableError(
        f"no rank 0 of {launch.world_size} answers at MASTER_ADDR={launch.address!r}, MASTER_PORT={launch.port} "
        f"({why}; for {seconds:.0f} s); give all ranks an address of rank 0's node, or unset {launch.variables} if "
        "they are left over from another job; where rank 0 starts later, set MEGALLAMA_ANSWER_SECONDS"
    )
