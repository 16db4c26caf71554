"""How large a checkpoint is, how long it stops training, and how often to make one. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

BYTES_PER_PARAMETER = 12
"""The fp32 master weight and both moments of AdamW: all that megallama writes."""
GPU_HOURS_BETWEEN_FAILURES = 50_700
"""419 unexpected interruptions in 54 days on 16,384 H100 (arXiv 2407.21783, table 5)."""
COPY_BYTES_PER_SECOND = 4e9
"""From a device to pageable memory of its host: 3 to 6 GB/s are reported. Training waits for that copy alone."""
LEAST_STOP_SECONDS = 0.5
"""To agree on the save, whatever its size. An assumption: 0.8 s are reported for 70B on 1,856 GPUs (pytorch.org)."""
RESTART_SECONDS = 600.0
"""From a failure to the first new step. An assumption: a queue that has room, imports, loading."""


@dataclass(frozen=True)
class Cadence:
    """When to save, and what saves and failures cost."""

    size: int
    """Bytes of a checkpoint."""
    stop_seconds: float
    """That training waits for a save."""
    failure_seconds: float
    """Mean time between failures of the job."""
    interval_seconds: float
    """Between two saves."""
    lost: float
    """Share of the time that saves, work done again, and restarts take."""


def cadence(parameters: int, world_size: int) -> Cadence:
    """Of a run with that many parameters on that many GPUs, each of which writes its share."""
    size = BYTES_PER_PARAMETER * parameters
    stop = LEAST_STOP_SECONDS + size / world_size / COPY_BYTES_PER_SECOND
    failure = GPU_HOURS_BETWEEN_FAILURES * 3600 / world_size
    interval = daly_interval(stop, failure)
    return Cadence(size, stop, failure, interval, lost_share(interval, stop, failure))


def young_interval(stop: float, failure: float) -> float:
    """Seconds between saves that take `stop` each, with `failure` between failures (Young, CACM 17(9), 1974)."""
    return sqrt(2 * stop * failure)


def daly_interval(stop: float, failure: float) -> float:
    """The same to higher order (Daly, FGCS 22(3), 2006, equation 37); `failure` where a save takes half as long."""
    if stop >= 2 * failure:
        return failure
    ratio = stop / (2 * failure)
    return young_interval(stop, failure) * (1 + sqrt(ratio) / 3 + ratio / 9) - stop


def lost_share(interval: float, stop: float, failure: float, restart: float = RESTART_SECONDS) -> float:
    """Saves, half an interval done again at each failure, and restarts, over the time in which they happen."""
    return stop / interval + interval / (2 * failure) + restart / failure
