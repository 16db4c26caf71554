"""Rotary frequencies go where their model goes, and stay as exact."""

from __future__ import annotations

import torch

from megallama.config.load import load_config
from megallama.model.llama import Llama
from megallama.model.rotary import rotary_frequencies
from tests.launching import CONFIG


def test_frequencies_move_with_the_model_and_are_not_rounded_with_it() -> None:
    config = load_config(CONFIG, []).model
    model = Llama(config)
    model = model.to(torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert torch.equal(model.frequencies, rotary_frequencies(config))
    assert model.to("meta").frequencies.device.type == "meta"
