"""What is said where torch's compiler is needed and is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.hardware.compiler import check_compiler

CONFIG = Path(__file__).parents[2] / "configs" / "debug.yaml"
GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["data.document_mask=true"], r"^data\.document_mask=true needs triton .* or use data\.document_mask=false$"),
        (["data.pack=one", "data.pad=left"], r"^data\.pad=left needs triton .* or use data\.pad=right$"),
        (["train.compile=true"], r"^train\.compile=true needs triton .* or use train\.compile=auto$"),
    ],
)
def test_what_is_compiled_in_any_case_is_refused_without_a_compiler(
    keys: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megallama.hardware.compiler.can_compile", lambda on_gpu: False)
    with pytest.raises(UserError, match=sentence):
        check_compiler(load_config(CONFIG, keys), GPU)


def test_what_needs_no_compiler_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megallama.hardware.compiler.can_compile", lambda on_gpu: False)
    check_compiler(load_config(CONFIG, []), GPU)
    check_compiler(load_config(CONFIG, ["data.document_mask=true"]), torch.device("cpu"))
    # Heads narrower than 16 are attended to document by document.
    check_compiler(load_config(CONFIG, ["data.document_mask=true", "model.num_attention_heads=8"]), GPU)
