"""`megallama verify` whose layouts run MLPs in tiles, for which a run that is shrunk has too few tokens.

Layouts with `full` or `offload` alone have tiles; the one process that they are compared with has none.
"""

from __future__ import annotations

from functools import partial

import megallama.model.tiled_mlp
import megallama.verify.verify
from megallama.cli import app


def small_tiles() -> None:
    """Every forward and backward takes several, the last of them a part of one."""
    megallama.model.tiled_mlp.GATES_AT_ONCE = 2**12


if __name__ == "__main__":
    # By its importable name, for ranks that are processes of their own.
    from tests.mutants.in_tiles import small_tiles as plant

    megallama.verify.verify.verify = partial(megallama.verify.verify.verify, plant=plant)
    app()
