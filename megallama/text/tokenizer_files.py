"""Files of tokenizers: how they are read, within bounds, and the side file that vouches for a saved folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megallama.errors import UserError
from megallama.system.regular_file import read_regular
from megallama.system.whole_file import put

SIDECAR_NAME = "megallama_tokenizer.json"

LARGEST_FILE = 256 << 20
LARGEST_ID = (1 << 31) - 2
"""The ids of a dataset are at most int32, and so is the size of the vocabulary."""

_SAVE_AGAIN = "save or train the tokenizer again"


def read_content(path: Path) -> bytes:
    """UserError if it cannot be read, but FileNotFoundError if it is not there."""
    try:
        return read_regular(path, LARGEST_FILE)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); mend that, or save or train it again") from None


def parse_object(content: bytes, path: Path, advice: str = _SAVE_AGAIN) -> dict[str, Any]:
    """The JSON object that `content`, of the file `path`, is; UserError, with the advice, if it is none."""
    try:
        found = json.loads(content)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply; {advice}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}); {advice}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no JSON object; {advice}")
    return found


def read_sidecar(folder: Path) -> dict[str, Any]:
    """What `write_sidecar` wrote; UserError if it is not there or broken."""
    path = folder / SIDECAR_NAME
    try:
        return parse_object(read_content(path), path)
    except FileNotFoundError:
        near = f", or tokenizer hf:{folder}" if (folder / "tokenizer.json").exists() else ""
        raise UserError(
            f"{folder} holds no {SIDECAR_NAME}; name a folder from `megallama tokenizer train`{near}"
        ) from None


def write_sidecar(folder: Path, content: dict[str, Any]) -> None:
    """`content` has the format, the fingerprint, and what else that format needs."""
    folder.mkdir(parents=True, exist_ok=True)
    put(folder / SIDECAR_NAME, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
