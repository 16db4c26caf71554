"""The sizes that are called legal are those that a check lets pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.errors import UserError
from megallama.layout.check import check_config
from megallama.layout.legal import legal_contexts, legal_tensors
from tests.layout.test_check import run


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_every_tensor_size_called_legal_passes_and_every_other_is_refused(
    tmp_path: Path, kv_heads: int, context: int
) -> None:
    given = [f"model.num_key_value_heads={kv_heads}", f"parallel.context={context}", "data.sequence_length=12"]
    legal = legal_tensors(run(tmp_path, [*given, "train.micro_batch_size=1"]))
    assert legal == ([1, 2, 4] if context == 1 else [1, 2])
    for tensor in range(1, 17):
        config = run(tmp_path, [*given, "train.micro_batch_size=1", f"parallel.tensor={tensor}"])
        if tensor in legal:
            check_config(config, tensor * context)
        else:
            with pytest.raises(UserError):
                check_config(config, tensor)


@pytest.mark.parametrize("mode", ["gather", "ulysses"])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_every_context_size_called_legal_passes_and_every_other_is_refused(
    tmp_path: Path, mode: str, tensor: int
) -> None:
    given = [f"parallel.context_mode={mode}", f"parallel.tensor={tensor}", "train.micro_batch_size=1"]
    legal = legal_contexts(run(tmp_path, given))
    assert legal[:3] == ([1, 2, 3] if mode == "gather" else [1, 2, 4][: 3 - tensor // 2])
    for context in range(1, 17):
        config = run(tmp_path, [*given, f"parallel.context={context}"])
        if context in legal:
            check_config(config, tensor * context)
        else:
            with pytest.raises(UserError):
                check_config(config, tensor * context)
