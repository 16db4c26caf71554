"""`python -m megallama.evaluation.harness`: the command line of lm-evaluation-harness, which then knows our models.

lm_eval 0.4 looks for a model in a table of its own and reads no entry points: `--model megallama` must be entered
before its command line runs.
"""

from __future__ import annotations

import sys

from megallama.errors import UserError


def main() -> None:
    """Hand all arguments to lm_eval; a user's mistake ends in one sentence and exit code 2."""
    try:
        _run()
    except UserError as error:
        print(f"megallama: {error}", file=sys.stderr)
        sys.exit(2)


def _run() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import register_model
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        raise UserError("the tasks need lm_eval; pip install 'megallama[lm-eval]'") from None
    # It imports lm_eval's own models, which are entered only while the table is empty.
    from megallama.evaluation.harness_model import Megallama

    register_model("megallama")(Megallama)
    cli_evaluate()


if __name__ == "__main__":
    main()
