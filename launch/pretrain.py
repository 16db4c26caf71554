"""Pretrain: `deepspeed launch/pretrain.py --config C.yaml [key.sub=value ...]`.

Runs under deepspeed, torchrun, srun, mpirun or plain python, on CPU and CUDA, on one node or many.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import NoReturn

from megallama.errors import SharedError, UnreachableError, UserError, refuse_hidden
from megallama.parallel.door import open_door
from megallama.parallel.launch import Launch
from megallama.system.signals import Signals, end_by_signals, hold_all_signals, hold_signals

FIRST_SPEAKS_SECONDS = 10.0
FIRST_LEAVES_SECONDS = 2.0


def main(arguments: Sequence[str] | None = None, launch: Launch | None = None) -> int:
    """Train as one rank of the job and return its exit code; UserError for what the user can mend."""
    launch = launch or launch_here()
    from megallama.config.load import load_config
    from megallama.run_dir.outcome import exit_code

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="config file of the run")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it; the environment counts
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that override the file")
    refuse_hidden(
        sys.argv[1:] if arguments is None else arguments
    )  # argparse prints what it does not know as it stands
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    from megallama.train.start import start

    return exit_code(start(config, launch).status, elastic=launch.elastic)


def launch_here() -> Launch:
    """What the launcher says of this process, whose signals are heeded from here on: imports take seconds."""
    signals = Signals()
    signals.take()
    launch = replace(Launch.from_environment(), signals=signals)
    signals.speaks = launch.rank == 0
    return launch


def run() -> None:
    """Run `main` and leave: 0 when done, 75 to be started again, 2 after one sentence of the user's mistake, 1 else.

    2 and 1 leave at once: in order would wait for the other ranks, which wait for this one.
    """
    hold_signals()
    launch = Launch()
    try:
        launch = launch_here()
        launch = replace(launch, door=open_door(launch))
        code = main(launch=launch)
    except UserError as error:
        refuse(launch, error)
    except Exception:
        print(f"megallama: rank {launch.rank} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)
    hold_all_signals()
    sys.exit(code)


def refuse(launch: Launch, error: UserError) -> NoReturn:
    """Leave with 2, one rank having said why: rank 0 at once, another where rank 0 does not say it for it."""
    sentence = str(error)
    if launch.rank != 0:
        sentence = f"rank {launch.rank}: {error}"
        # What every rank finds the first says, and a launcher ends the others when it leaves.
        end_by_signals()
        if said_by_first(launch, error, sentence):
            os._exit(2)
    print(f"megallama: {sentence}", file=sys.stderr, flush=True)
    if launch.door is not None and launch.by_tasks:
        from megallama.parallel.join import stay

        stay(launch, sentence, FIRST_SPEAKS_SECONDS)
    os._exit(2)


def said_by_first(launch: Launch, error: UserError, sentence: str) -> bool:
    """Whether rank 0 says it, after the time that it takes rank 0 to do so."""
    if isinstance(error, SharedError | UnreachableError):
        time.sleep(FIRST_LEAVES_SECONDS)
        return isinstance(error, SharedError)
    from megallama.parallel.join import tell

    until = time.monotonic() + FIRST_SPEAKS_SECONDS
    if tell(launch, sentence, FIRST_SPEAKS_SECONDS):
        return True
    time.sleep(max(0.0, until - time.monotonic()))
    return False


if __name__ == "__main__":
    run()
