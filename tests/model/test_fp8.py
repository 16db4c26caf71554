"""Matrix products in fp8: exact where fp8 is, close elsewhere, and the same at every layout within its rounding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.hardware import fp8
from megallama.hardware.fp8 import check_fp8
from megallama.layout.names import parse_layout
from megallama.model.layers import IN_DTYPE, ColumnParallelLinear, Matmuls, RowParallelLinear
from megallama.model.llama import Llama
from megallama.verify.report import as_json
from megallama.verify.verify import verify

pytest.importorskip("torchao")
from megallama.model.fp8 import Fp8Matmuls

CPU = torch.device("cpu")
CONFIG = "configs/debug.yaml"
EMULATED = ["train.dtype=bf16", "train.matmul=fp8_emulated"]


def products(x: Tensor, weight: Tensor, grad: Tensor) -> list[tuple[Tensor, Tensor]]:
    """In fp8, and in the type that they have."""
    calls: list[Callable[[Matmuls], Tensor]] = [
        lambda matmuls: matmuls.forward(x, weight),
        lambda matmuls: matmuls.by_input(grad, weight),
        lambda matmuls: matmuls.by_weight(grad, x),
    ]
    return [(call(Fp8Matmuls(emulated=True)), call(IN_DTYPE)) for call in calls]


def test_numbers_that_fp8_has_are_multiplied_exactly() -> None:
    """Up to 7, which takes part: the scale, 448 / 7 or 57344 / 7, is then a power of two."""
    random, tensors = torch.Generator().manual_seed(0), []
    for shape in ((8, 2, 48), (32, 48), (8, 2, 32)):
        tensors.append(torch.randint(-7, 8, shape, generator=random).float())
        tensors[-1].view(-1)[0] = 7.0
    for ours, exact in products(*tensors):
        assert torch.equal(ours, exact)


def test_others_are_rounded_as_fp8_rounds() -> None:
    """A number is off by 2^-4 of it at most in e4m3, by 2^-3 in e5m2; a sum of many products by less."""
    torch.manual_seed(0)
    x, weight, grad = torch.randn(16, 4, 64), torch.randn(96, 64), torch.randn(16, 4, 96)
    for (ours, exact), bound in zip(products(x, weight, grad), (0.05, 0.08, 0.08), strict=True):
        apart = float((ours - exact).norm() / exact.norm())
        assert bound / 4 < apart < bound


def test_the_linear_layers_of_the_decoder_multiply_so() -> None:
    """Embedding and head are none of them."""
    model = Llama(load_config(CONFIG).model)
    matmuls = Fp8Matmuls(emulated=True)
    model.multiply_by(matmuls)
    found = [module for module in model.modules() if getattr(module, "matmuls", None) is matmuls]
    assert len(found) == 4 * model.config.num_hidden_layers
    assert all(isinstance(module, ColumnParallelLinear | RowParallelLinear) for module in found)


@pytest.mark.parametrize(
    "layouts",
    [
        "pp2-dualpipev-acc4 tp2",
        pytest.param("tp2-nosp dp2-zero3 selective full pp2-zbvzerobubble-acc4 dp2-host", marks=pytest.mark.layouts),
    ],
)
def test_every_layout_gives_the_answer_of_one_process_within_the_bounds_of_fp8(layouts: str) -> None:
    """The run itself stays close to bf16, and is not bf16."""
    report = verify(load_config(CONFIG, EMULATED), [parse_layout(name) for name in layouts.split()], dtype="bf16")
    assert report.passed, as_json(report)


def test_a_split_backward_is_that_of_a_whole_one_to_the_bit_and_neither_is_bf16() -> None:
    layouts = [parse_layout(name) for name in ("acc4", "pp2-dualpipev-acc4")]
    whole, split = verify(load_config(CONFIG, EMULATED), layouts, dtype="bf16").verdicts
    assert split.losses == whole.losses
    (exact,) = verify(load_config(CONFIG, EMULATED[:1]), layouts[:1], dtype="bf16").verdicts
    # Of as many layers, so that only the products differ.
    assert exact.losses != whole.losses


@pytest.mark.parametrize(
    ("capability", "matmul", "sentence"),
    [
        ((8, 0), "fp8", "this one, A100, has 8.0; use train.matmul=dtype"),
        ((8, 6), "fp8", "has 8.6"),
        ((8, 9), "fp8", None),
        ((9, 0), "fp8", None),
        ((8, 0), "fp8_emulated", None),
    ],
)
def test_a_gpu_without_fp8_is_refused(
    capability: tuple[int, int], matmul: str, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    config = load_config(CONFIG, ["train.dtype=bf16", f"train.matmul={matmul}"])
    if sentence is None:
        check_fp8(config, torch.device("cuda"))
        return
    with pytest.raises(UserError, match=sentence):
        check_fp8(config, torch.device("cuda"))


def test_a_cpu_and_a_missing_package_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(CONFIG, ["train.dtype=bf16", "train.matmul=fp8"])
    with pytest.raises(UserError, match=r"needs a GPU, and this run is on a CPU; use train\.matmul=dtype"):
        check_fp8(config, CPU)
    monkeypatch.setattr(fp8, "find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs torchao, which is not installed"):
        check_fp8(config, CPU)
    check_fp8(load_config(CONFIG), CPU)
