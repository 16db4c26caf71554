"""What long sequences need changes no answer: MLPs in tiles, and inputs of layers away from the device."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

import megallama.model.llama
import megallama.model.tiled_mlp
import megallama.train.run
from megallama.config.deepspeed import deepspeed_config
from megallama.config.schema import RunConfig
from megallama.layout.names import parse_layout
from megallama.model.offload import OffloadedInputs, _Arriving, _Input
from megallama.verify.verify import verify
from tests.verify.test_parity import assert_all_equal, debug_config


def small_tiles() -> None:
    """Every forward and backward takes several, the last of them a part of one; inputs leave as copies.

    ZeRO 3 cuts the weights of layers this small as well: else it would keep them whole on every rank.
    """

    class Away(OffloadedInputs):
        def _out(self, tensor: Tensor) -> Tensor:
            return tensor.clone()

        def _back(self, packed: _Input) -> _Arriving:
            return _Arriving(packed.index, packed.held.clone(), None)

    patch.object(megallama.model.llama, "OffloadedInputs", Away).start()
    megallama.model.tiled_mlp.GATES_AT_ONCE = 2**12

    def settings(config: RunConfig, dp_size: int) -> dict[str, Any]:
        made = deepspeed_config(config, dp_size)
        made["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made

    megallama.train.run.deepspeed_config = settings


@pytest.mark.parametrize(
    ("layouts", "dtype", "overrides"),
    [
        ("offload dp2-zero3-full tp2-dp2-zero3-acc4-offload", "fp32", []),
        ("cp2-offload tp2-cp2-ulysses-full", "fp32", ["data.document_mask=true"]),
        ("tp2-nosp-offload dp2-zero2-offload", "bf16", []),
        ("pp2-zbvzerobubble-offload tp2-pp2-dualpipev-offload", "fp32", ["data.document_mask=true"]),
        ("pp2-offload pp2-interleaved1f1b-full tp2-pp2-zbvzerobubble-full", "bf16", []),
    ],
)
@pytest.mark.layouts
def test_long_sequences_get_the_answer_of_one_process(layouts: str, dtype: str, overrides: list[str]) -> None:
    report = verify(
        debug_config(*overrides), [parse_layout(name) for name in layouts.split()], dtype=dtype, plant=small_tiles
    )
    assert_all_equal(report)
