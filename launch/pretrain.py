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

from megallama.config.load import load_config
from megallama.errors import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 2 for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="YAML file of the run")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # the deepspeed launcher adds it; the environment counts
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that win over the file")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.overrides)
        from megallama.parallel.mesh import Launch
        from megallama.start import start

        start(config, Launch.from_environment())
    except UserError as error:
        if first_rank():
            print(f"megallama: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def run() -> None:
    """Run `main` and leave; a rank that fails leaves at once, so that the launcher ends the others."""
    try:
        code = main()
    except Exception:
        rank = os.environ.get("RANK", "0")
        print(f"megallama: rank {rank} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # Leaving in order would wait for the other ranks, which wait for this one.
        os._exit(1)
    if code == 2 and not first_rank():
        time.sleep(10)  # a launcher ends all ranks when one leaves: let the first speak for all
    sys.exit(code)


def first_rank() -> bool:
    """Whether this process speaks for the job."""
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    run()
