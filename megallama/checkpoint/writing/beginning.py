"""A checkpoint of weights alone, written by one process, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from megallama.checkpoint.format import LATEST, STATE, TENSORS, File, folder_name
from megallama.checkpoint.reading.inspect import expected_shapes
from megallama.checkpoint.state import DataIdentity, TrainState, state_document
from megallama.checkpoint.tensors import ELEMENT, Array, is_weight
from megallama.checkpoint.writing.commit import PARTIAL, commit, point
from megallama.config.schema import ModelConfig

_FILE = "rank_00000.bin"
_ZEROS = bytes(1 << 24)


def write_beginning(folder: Path, model: ModelConfig, data: DataIdentity, read: Callable[[str], Array]) -> Path:
    """Make the checkpoint of step 0 in `folder`, with the weights that `read` gives by name and moments of zero.

    The moments are a hole in the file and take no place on most disks. OSError if it cannot be written.
    """
    final = folder / folder_name(0)
    partial = final.with_name(f"{final.name}.{PARTIAL}-0")
    partial.mkdir(parents=True)
    places: dict[str, object] = {}
    end, digest = 0, hashlib.sha256()
    with (partial / _FILE).open("xb") as file:
        for name, shape in expected_shapes(model).items():
            whole = {"offset": [0] * len(shape), "shape": list(shape), "file": _FILE, "start": end}
            places[name] = {"shape": list(shape), "chunks": [whole]}
            end += ELEMENT * math.prod(shape)
            if is_weight(name):  # all of them stand before the moments
                numbers = read(name).data.cast("B")
                digest.update(numbers)
                file.write(numbers)
        written = file.tell()
        file.truncate(end)
        file.flush()
        os.fsync(file.fileno())
    for start in range(written, end, len(_ZEROS)):
        digest.update(_ZEROS[: end - start])
    layout: dict[str, object] = {"tensor": 1, "pipeline": 1, "schedule": "1f1b", "data": 1, "zero_stage": 1}
    layout |= {"context": 1, "context_mode": "gather"}
    state = state_document(TrainState(), math.nan, True, data, model, layout | {"dtype": "fp32"})
    documents = {TENSORS: {"dtype": "float32", "tensors": places}, STATE: state}
    versions = {package: version(package) for package in ("megallama", "torch")}
    commit(partial, final, {_FILE: File(end, digest.hexdigest())}, documents, time.time(), versions)
    point(folder / LATEST, final.name)
    return final
