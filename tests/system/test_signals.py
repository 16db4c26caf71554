"""Signals of a process that has nothing else to do: which ones are taken over, which end it, which stay ignored."""

from __future__ import annotations

import subprocess
import sys

import pytest

SHOW = """
import signal
from megallama.system.signals import STOP_SIGNALS, Signals

Signals().take()
print(*(number.name for number in STOP_SIGNALS if signal.getsignal(number) is signal.SIG_IGN))
"""
HEARD = """
import signal, sys
from megallama.system.signals import Signals

first, later, launcher, seconds = sys.argv[1:]
signals = Signals()
signals.speaks = False
signals.training(elastic=launcher == "torchrun")
signals.hear(signal.Signals[first], 0.0)
signals.hear(signal.Signals[later], float(seconds))
signals.hear(signal.Signals[later], 2 * float(seconds))
assert signals.asked
"""


@pytest.mark.parametrize("ignored", ["", "HUP", "INT", "HUP INT"])
def test_what_nohup_and_a_shell_in_the_background_ignore_stays_ignored(ignored: str) -> None:
    start = f"trap '' {ignored}; " if ignored else ""
    command = ["sh", "-c", start + 'exec "$@"', "sh", sys.executable, "-c", SHOW]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(shown.split()) == {f"SIG{name}" for name in ignored.split()}


@pytest.mark.parametrize(
    ("first", "later", "launcher", "seconds", "code"),
    [
        ("SIGINT", "SIGINT", "python", 2.0, 130),
        ("SIGTERM", "SIGINT", "python", 2.0, 130),
        ("SIGINT", "SIGTERM", "torchrun", 2.0, 130),
        ("SIGINT", "SIGTERM", "deepspeed", 2.0, 0),
        ("SIGINT", "SIGHUP", "torchrun", 2.0, 0),
        ("SIGTERM", "SIGTERM", "torchrun", 2.0, 0),
        ("SIGUSR1", "SIGTERM", "torchrun", 2.0, 0),
        ("SIGHUP", "SIGHUP", "python", 2.0, 0),
        ("SIGINT", "SIGINT", "torchrun", 0.1, 0),
    ],
)
def test_only_a_second_ctrl_c_ends_before_the_save(
    first: str, later: str, launcher: str, seconds: float, code: int
) -> None:
    """Schedulers repeat their signals, and deepspeed adds SIGTERM to a Ctrl-C; torchrun makes one of the second.

    srun and torchrun may both pass on the first.
    """
    done = subprocess.run([sys.executable, "-c", HEARD, first, later, launcher, str(seconds)], capture_output=True)
    assert (done.returncode, done.stderr) == (code, b"")


LIBRARY = """
import signal
from megallama.system.signals import end_in_order

with end_in_order():
    try:
        signal.raise_signal(signal.SIGTERM)
    except SystemExit:
        raise AttributeError("no such type") from None
"""


def test_an_end_in_order_is_one_also_where_a_library_makes_another_exception_of_it() -> None:
    """As safetensors does, which first asks for torch's types while it reads."""
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True)
    assert (done.returncode, done.stderr) == (143, b"")
