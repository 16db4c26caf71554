"""A checkpoint as the folder of another program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megallama.checkpoint.commands.listing import checkpoint_at
from megallama.checkpoint.commands.progress import shown
from megallama.checkpoint.format import (
    TornCheckpointError,
    damaged_files,
    read_document,
    read_manifest,
)
from megallama.checkpoint.reading.inspect import promised
from megallama.checkpoint.state import check_causal, name_of_weight, read_saved
from megallama.checkpoint.tensors import Stored
from megallama.config.schema import ModelConfig
from megallama.errors import UserError
from megallama.exchange.model_card import model_card
from megallama.exchange.new_folder import new_folder
from megallama.formats.hugging_face import write_hugging_face
from megallama.formats.meta import write_meta
from megallama.formats.weights import llama_shapes
from megallama.text.hf_tokenizer import save_hugging_face
from megallama.text.tokenizer import load_tokenizer

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS = ("hf", "meta")


class CheckpointWeights:
    """The weights of a checkpoint, or their `average`; `Weights`.

    Each is looked at when it is read: UserError if it is not finite.
    """

    def __init__(self, path: Path, report: Callable[[str], None], *, average: bool = False) -> None:
        self._path, self._report = path, report
        self._stored = _sound(path, report)
        saved = read_saved(path)
        check_causal(path, saved)  # no program's Llama looks at what follows
        self._stored_name = name_of_weight(path, saved, average=average)
        self.config: ModelConfig = saved.model
        self.model: dict[str, Any] = self.config.model_dump(mode="json")
        self.shapes = llama_shapes(self.config)

    def read(self, name: str) -> Tensor:
        """One weight in fp32, in memory of its own."""
        self._report(f"{self._path.name}: {name}")
        tensor = torch.from_numpy(self._stored.read(self._stored_name(name)))
        if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
            raise UserError(f"the checkpoint {self._path} has {name}, which is not finite; use another")
        return tensor


def export(source: Path, out: Path, form: str, dtype: str, *, average: bool = False) -> Path:
    """Make the folder `out` from the checkpoint that `source` means, as `checkpoint_at` tells; returns that.

    `form` is one of FORMATS, `dtype` of DTYPES. Memory is that of one tensor. UserError if there is no sound
    checkpoint, or none with an `average` where it is wanted, `out` exists or cannot be written, or the format cannot
    hold the model.
    """
    if form not in FORMATS:
        raise UserError(f"--format {form} is not known; expected {' or '.join(FORMATS)}")
    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not known; expected {' or '.join(DTYPES)}")
    path, run_dir = checkpoint_at(source)
    folder = run_dir / "tokenizer"
    tokenizer = load_tokenizer(str(folder)) if folder.is_dir() else None
    with new_folder(out) as partial, shown() as report:
        weights = CheckpointWeights(path, report, average=average)
        eod_id = None if tokenizer is None else tokenizer.eod_id
        if form == "meta":
            write_meta(weights, weights.config, partial, DTYPES[dtype])
            if tokenizer is not None:
                tokenizer.save(partial / "tokenizer")
        else:
            write_hugging_face(weights, weights.config, partial, DTYPES[dtype], eod_id)
            if tokenizer is not None:
                save_hugging_face(tokenizer, partial)
        card = model_card(run_dir.name, path, read_document(path), weights.config, dtype, form, average=average)
        (partial / "README.md").write_text(card)
    return path


def _sound(path: Path, report: Callable[[str], None]) -> Stored:
    """The tensors of a checkpoint whose files are those that were written. UserError if they are not."""
    try:
        manifest = read_manifest(path)
        for name in manifest.files:
            report(f"{path.name}: {name}")
            if reasons := damaged_files(path, manifest, [name]):
                raise TornCheckpointError(reasons[0])
        return promised(path)
    except TornCheckpointError as error:
        raise UserError(f"the checkpoint {path} is damaged ({error}); use another") from None
