"""Rotary angles are exact at every position, and go where their model goes."""

from __future__ import annotations

import math

import pytest
import torch

from megallama.config.load import load_config
from megallama.model.llama import Llama
from megallama.model.rotary import rotary_frequencies, rotate, rotation
from tests.launching import CONFIG


def test_frequencies_move_with_the_model_and_are_not_rounded_with_it() -> None:
    config = load_config(CONFIG, []).model
    model = Llama(config)
    model = model.to(torch.bfloat16)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert torch.equal(model.frequencies, rotary_frequencies(config))
    assert model.to("meta").frequencies.device.type == "meta"


@pytest.mark.parametrize("theta", [1e4, 5e5, 4e6])
def test_the_rotation_of_the_last_of_131072_positions_is_exact(theta: float) -> None:
    """To the rounding of cos and sin to fp32, against Python's own numbers; in fp32 angles are off by up to 0.01."""
    model = load_config(CONFIG, [f"model.rope_theta={theta}"]).model
    frequencies, places = rotary_frequencies(model), [0, 1, 8_191, 65_537, 131_070, 131_071]
    cos, sin = rotation(torch.tensor(places), frequencies)
    assert (cos.dtype, cos.shape) == (torch.float32, (1, len(places), model.head_size))
    for row, place in enumerate(places):
        for pair in range(model.head_size // 2):
            angle = place / theta ** (2 * pair / model.head_size)
            for half in (pair, pair + model.head_size // 2):
                assert abs(float(cos[0, row, half]) - math.cos(angle)) < 1e-7
                assert abs(float(sin[0, row, half]) - math.sin(angle)) < 1e-7


def test_scores_depend_on_distance_alone_at_any_position() -> None:
    model = load_config(CONFIG, ["model.head_dim=64"]).model
    q, k = torch.randn(2, 1, 1, 1, 64, generator=torch.Generator().manual_seed(4)).unbind(0)

    def score(place: int, distance: int) -> float:
        (cos_q, sin_q), (cos_k, sin_k) = (
            rotation(torch.tensor([each]), rotary_frequencies(model)) for each in (place, place - distance)
        )
        return float((rotate(q, cos_q, sin_q) * rotate(k, cos_k, sin_k)).sum())

    for distance in (0, 1, 1_000):
        assert abs(score(131_071, distance) - score(distance, distance)) < 1e-5
