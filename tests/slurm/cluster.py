"""A real Slurm on this machine: a controller and some nodes on loopback, eight GPUs each that are no GPUs."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from random import SystemRandom

from tests.launching import BIN, ROOT

UNPACKED = Path(sys.prefix) / "slurm"
"""Where `make test-slurm` puts Debian's packages; empty where Slurm is installed."""
NODES = ("n1", "n2", "n3")
READY_SECONDS = 30.0
ENDED = {
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "TIMEOUT",
}
"""A job passes through others, for a moment through SIGNALING too."""

CONFIGURATION = """
ClusterName=mini
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort={port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/ctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
JobRequeue=1
KillWait=30
MinJobAge=3600
SlurmdTimeout=10
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=64 RealMemory=1000000 Gres=gpu:8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=2
"""


class Cluster:
    """Jobs run as this user, in an environment of which `home` is a part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "log", "gpu", *(f"spool.{node}" for node in NODES)):
            (folder / name).mkdir()
        for number in range(8):
            (folder / "gpu" / f"gpu{number}").symlink_to("/dev/null")  # what is no device file is not counted
        controller = _free_ports(1 + len(NODES))
        first = controller + 1
        plugins = UNPACKED / "usr/lib/x86_64-linux-gnu/slurm-wlm"
        (folder / "slurm.conf").write_text(
            CONFIGURATION.format(
                host=socket.gethostname(),
                user=pwd.getpwuid(os.getuid()).pw_name,
                port=controller,
                folder=folder,
                nodes=f"n[1-{len(NODES)}]",
                first=first,
                last=first + len(NODES) - 1,
            )
            + (f"PluginDir={plugins}\n" if plugins.exists() else "")
        )
        nodes, files = f"n[1-{len(NODES)}]", folder / "gpu" / "gpu[0-7]"
        (folder / "gres.conf").write_text(f"NodeName={nodes} Name=gpu File={files}\n")
        self.environment = {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "LD_LIBRARY_PATH": f"{plugins}:{UNPACKED}/usr/lib/x86_64-linux-gnu",
            "PATH": os.pathsep.join([f"{UNPACKED}/usr/bin", f"{UNPACKED}/usr/sbin", str(BIN), os.environ["PATH"]]),
            "HOME": str(folder),
            "LANG": "C.UTF-8",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "MEGALLAMA_NPROC_PER_NODE": "2",
        }

    def start(self) -> None:
        """Bring the daemons up and wait for the nodes."""
        self.call("slurmctld", "-f", self.environment["SLURM_CONF"])
        for node in NODES:
            self.start_node(node)
        self.wait(lambda: self.idle_nodes() == set(NODES), READY_SECONDS)

    def call(self, *words: str, check: bool = True, timeout: float = 30.0, **variables: str) -> str:
        """What a command of Slurm's prints."""
        found = subprocess.run(
            words,
            env=self.environment | variables,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=timeout,
            stdin=subprocess.DEVNULL,
        )
        if check:
            assert found.returncode == 0, (words, found.stderr)
        return found.stdout if check else found.stdout + found.stderr

    def start_node(self, node: str, *, behind: Sequence[str] = ()) -> None:
        """Start a node's daemon, as an argument of the command `behind`."""
        stepd = UNPACKED / "usr/sbin/slurmstepd"
        where = ["-d", str(stepd)] if stepd.exists() else []
        self.call(*behind, "slurmd", "-N", node, "-f", self.environment["SLURM_CONF"], *where)

    def stop_node(self, node: str) -> None:
        """As if it lost its power: the daemon, its steps and their tasks are gone at once."""
        tasks = self._processes(f"SLURMD_NODENAME={node}")
        pids = [self._pid(f"slurmd.{node}"), *(_step_above(task) for task in tasks), *tasks]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.wait(lambda: not _alive(pids[0]), 10.0)
        (self.folder / f"slurmd.{node}.pid").unlink(missing_ok=True)

    def idle_nodes(self) -> set[str]:
        return set(self.call("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())

    def submit(self, *words: str, **variables: str) -> str:
        """`sbatch WORDS`; the job's id."""
        return self.call("sbatch", "--parsable", *words, **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` tells."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job)))

    def ended(self, job: str, timeout: float = 180.0) -> dict[str, str]:
        """The job, when it has ended."""
        self.wait(lambda: self.job(job)["JobState"] in ENDED, timeout)
        return self.job(job)

    def nodes(self, job: str) -> list[str]:
        """Those that the job runs on, the first one first."""
        return self.call("scontrol", "show", "hostnames", self.job(job)["NodeList"]).split()

    def controller_log(self, job: str) -> str:
        """The lines of the controller's log on a job: its nodes, requeues and end."""
        lines = (self.folder / "log" / "ctld.log").read_text().splitlines()
        return "\n".join(line for line in lines if re.search(rf"JobId={job}\b", line))

    def wait(self, what: Callable[[], object], timeout: float) -> None:
        """Until it is true; fails after `timeout`, with what the cluster says of itself."""
        deadline = time.monotonic() + timeout
        while not what():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout:.0f} s in vain\n{self.report()}")
            time.sleep(0.25)

    def report(self) -> str:
        """What to look at when something does not happen."""
        told = [
            self.call("sinfo", "-N", "-o", "%N %T %E", check=False),
            self.call("squeue", check=False),
        ]
        told += [path.read_text(errors="replace")[-3000:] for path in sorted((self.folder / "log").iterdir())]
        return "\n".join(told)

    def close(self) -> None:
        """End all jobs, then the daemons."""
        self.call("scancel", "--user", pwd.getpwuid(os.getuid()).pw_name, check=False)
        with suppress(AssertionError):
            self.wait(lambda: not self.call("squeue", "-h", check=False).strip(), 45.0)
        for name in (*(f"slurmd.{node}" for node in NODES), "ctld"):
            with suppress(OSError, ValueError):
                pid = self._pid(name)
                os.kill(pid, signal.SIGTERM)
                self.wait(lambda pid=pid: not _alive(pid), 10.0)
        for pid in self._processes(f"SLURM_CONF={self.environment['SLURM_CONF']}"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, job: str) -> list[int]:
        """What runs of a job's tasks."""
        return self._processes(f"SLURM_JOB_ID={job}")

    def _pid(self, name: str) -> int:
        return int((self.folder / f"{name}.pid").read_text())

    def _processes(self, mark: str) -> list[int]:
        """Processes of this cluster with this word in their environment."""
        ours = f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError):
                if folder.name.isdigit() and {ours, mark.encode()} <= set(
                    (folder / "environ").read_bytes().split(b"\0")
                ):
                    found.append(int(folder.name))
        return found


def slurm_is_here() -> bool:
    """Whether there are daemons to start."""
    return (UNPACKED / "usr/sbin/slurmctld").exists() or shutil.which("slurmctld") is not None


def _free_ports(count: int) -> int:
    """The first of so many free ports in a row.

    Above those of the jobs' rendezvous, and below those that the system gives to anybody before the daemons have begun.
    """
    while True:
        first = SystemRandom().randrange(31000, 32000)
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as listener:
                    listener.bind(("", port))
            return first


def _alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
    return ""


def _step_above(task: int) -> int:
    """The daemon that Slurm puts above the tasks of a step, or the task where that is gone."""
    pid = task
    with suppress(OSError):
        while pid > 1:
            if "slurmstepd" in _command(pid):
                return pid
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return task
