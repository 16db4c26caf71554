"""What megatron-core has made and saved, at tp 1 and 2, gives its logits and its first losses here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megallama.config.schema import ModelConfig
from megallama.formats.megatron import Megatron
from megallama.model.llama import Llama
from tests.exchange.megatron_core import DECAY, EPSILON, LONGEST, LR, STEPS, VARIANTS, VOCABULARY, tokens, write

pytestmark = pytest.mark.peers
TOLD = {
    "num_attention_heads": 4,
    "max_position_embeddings": LONGEST,
    "rms_norm_eps": EPSILON,
    "rope_theta": 10000.0,
}
"""What a checkpoint of megatron-core alone does not say."""


@pytest.fixture(scope="module", params=[1, 2])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and outcomes of every variant, by megatron-core at this tp."""
    out = tmp_path_factory.mktemp(f"tp{request.param}")
    # Not as daemons, which may not start the processes by which megatron-core writes.
    torch.multiprocessing.spawn(write, (request.param, out), nprocs=request.param)
    return out


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_losses_are_those_of_megatron(saved: Path, name: str) -> None:
    expected = torch.load(saved / f"{name}.pt", weights_only=True)
    model = imported(saved / name, name)
    with torch.no_grad():
        logits = model(tokens()[:, :-1])
    assert logits.shape[-1] == VOCABULARY
    assert expected["logits"].std() > 0.3
    torch.testing.assert_close(logits, expected["logits"][..., :VOCABULARY], rtol=0, atol=1e-4)
    # Megatron's softmax also runs over the padding, whose rows are left out above.
    model = imported(saved / name, name, vocab_size=expected["logits"].shape[-1])
    assert losses(model) == pytest.approx(expected["losses"], rel=0, abs=1e-5)
    assert expected["losses"][0] - expected["losses"][-1] > 0.1


def imported(folder: Path, name: str, **told: Any) -> Llama:
    """Our model with the weights of a checkpoint."""
    given = {**(TOLD if VARIANTS[name].args is None else {}), "vocab_size": VOCABULARY, **told}
    weights = Megatron(folder, given)
    model = Llama(ModelConfig(**weights.model))
    with torch.no_grad():
        for parameter_name, pieces in model.shard_slices.items():
            parameter = model.get_parameter(parameter_name).zero_()
            for piece in pieces:
                piece.of(parameter).copy_(weights.read(piece.name))
    return model


def losses(model: Llama) -> list[float]:
    """The mean losses of one batch before each of the first steps of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    found = []
    inputs, labels = tokens()[:, :-1], tokens()[:, 1:]
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(inputs, labels) / labels.numel()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found
