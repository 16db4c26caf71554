"""State bytes as DeepSpeed really holds them, for Llama-3 8B in GiB."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.plan.memory.ledger import held_rows
from megallama.plan.memory.state import GIB, rank_parameters, state_rows

PSI = 8_030_261_248
CONFIGS = Path(__file__).parents[2] / "configs"


def state_bytes(dtype: str, stage: int, parameters: int, dp: int) -> int:
    return sum(row.size for row in state_rows(dtype, stage, parameters, dp))


@pytest.mark.parametrize(
    ("stage", "by_dp"),
    [(1, (134.62, 56.09, 46.27)), (2, (134.62, 29.92, 16.83)), (3, (134.62, 16.83, 2.10))],
)
def test_bf16_state_of_llama_3_8b(stage: int, by_dp: tuple[float, ...]) -> None:
    found = [state_bytes("bf16", stage, PSI, dp) / GIB for dp in (1, 8, 64)]
    assert found == pytest.approx(by_dp, abs=0.005)


@pytest.mark.parametrize(
    ("dtype", "stage", "whole", "cut"),
    [
        ("bf16", 1, 6, 12),
        ("bf16", 2, 2, 16),
        ("bf16", 3, 0, 18),
        ("fp32", 1, 8, 8),
        ("fp32", 2, 4, 16),
        ("fp32", 3, 0, 20),
    ],
)
@pytest.mark.parametrize("dp", [1, 2, 8])
def test_bytes_per_parameter(dtype: str, stage: int, whole: int, cut: int, dp: int) -> None:
    psi = 1 << 20
    assert state_bytes(dtype, stage, psi, dp) == whole * psi + cut * psi // dp


def test_7b_has_state_for_each_of_its_four_stages() -> None:
    config = load_config(CONFIGS / "7b.yaml")
    held = [sum(row.size for row in held_rows(config, rank, 16)) for rank in rank_parameters(config)]
    psi = (32000 * 4096 + 8 * (202_383_360 - 8192)) // 2 + 8 * 8192
    assert held[0] == 6 * psi + 12 * psi // 16
    assert held[1] == held[2] < held[0] < held[3]
