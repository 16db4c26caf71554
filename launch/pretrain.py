"""Pretrain: `deepspeed launch/pretrain.py --config C.yaml [key.sub=value ...]`.

The same file under deepspeed, torchrun and plain python, on CPU and CUDA, on one node or many.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace

from megallama.errors import UserError
from megallama.launcher import Ancestors
from megallama.signals import Signals, end_by_signals, hold_all_signals, hold_signals

FIRST_SPEAKS_SECONDS = 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as one rank of the job and return its exit code; UserError for what the user can mend."""
    launcher, signals = Ancestors(), Signals(speaks=os.environ.get("RANK", "0") == "0")
    signals.take()  # before the imports, which take seconds
    from megallama.config.load import load_config
    from megallama.outcome import exit_code

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it; the environment counts
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that win over the file")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    from megallama.parallel.mesh import Launch
    from megallama.start import start

    launch = replace(Launch.from_environment(), launcher=launcher, signals=signals)
    return exit_code(start(config, launch).status, elastic=launch.elastic)


def run() -> None:
    """Run `main` and leave: 0 when done, 75 to be started again, 2 after one sentence of the user's mistake, 1 else.

    2 and 1 leave at once: in order would wait for the other ranks, which wait for this one.
    """
    hold_signals()
    rank = os.environ.get("RANK", "0")
    try:
        code = main()
    except UserError as error:
        if rank != "0":
            # What every rank finds the first says, and a launcher ends the others when it leaves.
            end_by_signals()
            time.sleep(FIRST_SPEAKS_SECONDS)
        print(f"megallama: {'' if rank == '0' else f'rank {rank}: '}{error}", file=sys.stderr, flush=True)
        os._exit(2)
    except Exception:
        print(f"megallama: rank {rank} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        os._exit(1)
    hold_all_signals()
    sys.exit(code)


if __name__ == "__main__":
    run()
