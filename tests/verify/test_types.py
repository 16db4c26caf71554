"""Every layout has types that fit, and what is left out of a layer is found at its line, without a second process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

from megallama.cli import app
from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.model.layers import RMSNorm, RowParallelLinear, _ColumnLinear, column_linear
from megallama.model.llama import DecoderLayer, _head_norm
from megallama.parallel import types
from megallama.parallel.collectives import all_gather, copy_to
from megallama.parallel.mesh import ALONE, Axis
from megallama.verify.types import TypeReport, check_types

CONFIG = "configs/debug.yaml"
TP = "parallel.tensor=2"
CP = "parallel.context=2"
NORMED = "model.qk_norm=true"
ULYSSES = ("parallel.context_mode=ulysses", "model.num_key_value_heads=4")


def check(*overrides: str, gpus: int = 8, **others: Any) -> TypeReport:
    return check_types(load_config(CONFIG, overrides), gpus, **others)


@pytest.mark.parametrize(
    "overrides",
    [
        [TP],
        [TP, "parallel.sequence=false"],
        ["parallel.tensor=4", "model.num_key_value_heads=2"],
        ["parallel.tensor=4", "model.num_key_value_heads=2", "parallel.sequence=false"],
        [TP, "model.tie_word_embeddings=true"],
        [TP, "model.tie_word_embeddings=true", "parallel.pipeline=2", "parallel.schedule=zbvzerobubble"],
        [TP, "train.recompute=full"],
        [TP, "train.recompute=selective", "parallel.sequence=false"],
        [TP, "data.document_mask=true"],
        [TP, "data.document_mask=true", "parallel.sequence=false", "parallel.pipeline=2"],
        [TP, "train.objective=masked"],
        [TP, "train.freeze=[model.embed_tokens.weight, model.layers.0.*]"],
        [TP, "parallel.pipeline=2", "parallel.schedule=interleaved1f1b"],
        ["parallel.pipeline=2"],
        [CP],
        [CP, *ULYSSES],
        [CP, TP],
        [CP, TP, *ULYSSES, "parallel.sequence=false"],
        [CP, "parallel.tensor=4", "model.num_key_value_heads=2"],
        [CP, TP, "data.document_mask=true", "train.recompute=full"],
        [CP, TP, *ULYSSES, "data.document_mask=true"],
        [CP, "train.objective=masked", "parallel.pipeline=2"],
        [TP, NORMED, "optimizer.z_loss=1e-4"],
        [TP, NORMED, "parallel.sequence=false", "parallel.pipeline=2", "parallel.schedule=zbvzerobubble"],
        ["parallel.tensor=4", NORMED, "model.num_key_value_heads=2", "train.recompute=full"],
        ["parallel.tensor=4", NORMED, "model.num_key_value_heads=2", "parallel.sequence=false"],
        [CP, TP, NORMED],
        [CP, TP, NORMED, *ULYSSES, "data.document_mask=true"],
    ],
    ids=" ".join,
)
def test_every_layout_fits(overrides: list[str]) -> None:
    stages = {"parallel.pipeline=2": 2, "parallel.schedule=zbvzerobubble": 4, "parallel.schedule=interleaved1f1b": 4}
    split = ["model.num_hidden_layers=4", "train.global_batch_size=32"]
    report = check(*split, *overrides)
    assert report.fault is None
    assert len(report.stages) == max([1, *(stages[word] for word in overrides if word in stages)])


@pytest.mark.parametrize("overrides", [[TP], [TP, CP], [TP, CP, *ULYSSES]], ids=" ".join)
def test_documents_of_any_length_fit(overrides: list[str]) -> None:
    """On tensors with values, since where a document ends is one."""
    config = load_config(CONFIG, [*overrides, "data.document_mask=true"])
    documents = torch.arange(config.data.sequence_length).div(10, rounding_mode="floor")
    documents = documents.expand(config.train.micro_batch_size, -1).contiguous()
    assert check_types(config, 8, device="cpu", documents=documents).fault is None


def test_every_collective_of_a_layer_is_seen() -> None:
    (stage,) = check(TP).stages
    assert stage.crossings["tp"] == {
        "ColumnLinear": 4,
        "ReduceScatter": 5,  # one of them behind the embedding
        "Gather": 1,
        "LinearCrossEntropy": 1,
    }
    (stage,) = check(TP, "parallel.sequence=false", NORMED).stages
    assert stage.crossings["tp"] == {"ReduceFrom": 5, "ColumnLinear": 4, "CopyTo": 1, "LinearCrossEntropy": 1}
    (stage,) = check(CP).stages
    assert stage.crossings["cp"] == {"Gather": 2}
    (stage,) = check(CP, *ULYSSES).stages
    assert stage.crossings["cp"] == {"AllToAll": 6}


def left_out(x: Tensor, *_: object) -> Tensor:
    return x


def uncopied(x: Tensor, weight: Tensor, *_: object) -> Tensor:
    return F.linear(x, weight)


def twice(x: Tensor, weight: Tensor, tp: Axis, *rest: Any) -> Tensor:
    return column_linear(copy_to(x, tp), weight, tp, *rest)


def unshared(name: str, width: int, eps: float, share: bool) -> RMSNorm:
    return RMSNorm(name, width, eps, share=False)


def unmarked(rows: int, columns: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(rows, columns))


def not_summed(layer: RowParallelLinear, x: Tensor) -> Tensor:
    return layer.matmul(x)


class CutBack(torch.autograd.Function):
    """A gather whose gradient is cut and not summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, axis: Axis) -> Tensor:
        ctx.dim, ctx.axis = dim, axis
        return all_gather(x, dim, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].chunk(ctx.axis.size, ctx.dim)[ctx.axis.rank], None, None

    @staticmethod
    def spmd_typecheck(*, x: Tensor, dim: int, axis: Axis) -> types.Typed:
        from spmd_types import I, MeshAxis, S, rules

        return rules.all_gather(x, MeshAxis.of(axis.group), src=S(dim), dst=I)


def cut_back(x: Tensor, dim: int, axis: Axis) -> Tensor:
    return CutBack.apply(x, dim, axis)


def of_one_rank(norm: str) -> Callable[..., nn.Module]:
    """Its weight's gradient stays that of this rank's heads."""
    return lambda name, config, tp: _head_norm(name, config, ALONE if name == norm else tp)


NO_SEQUENCE = (TP, "parallel.sequence=false")
NORM_LINE = "return F.rms_norm(x, (self.width,), self.weight, self.eps)"
FEW_HEADS = ("parallel.tensor=4", "model.num_key_value_heads=2", "parallel.sequence=false")


@pytest.mark.parametrize(
    ("name", "broken", "overrides", "line"),
    [
        ("layers.column_linear", uncopied, NO_SEQUENCE, "return column_linear(x, self.weight, self.tp, "),
        ("llama.copy_to", left_out, NO_SEQUENCE, "return linear_cross_entropy("),
        ("layers.column_linear", twice, NO_SEQUENCE, "types.invariant_to_replicate(x, tp)"),
        ("layers._weight", unmarked, NO_SEQUENCE, "return reduce_from(partial, self.tp)"),
        ("llama.RMSNorm", unshared, (TP,), NORM_LINE),
        ("llama._head_norm", of_one_rank("q_norm"), (TP, NORMED), NORM_LINE),
        ("llama._head_norm", of_one_rank("k_norm"), (*FEW_HEADS, NORMED), NORM_LINE),
        ("layers.reduce_from", left_out, NO_SEQUENCE, NORM_LINE),
        ("layers.RowParallelLinear.forward", not_summed, NO_SEQUENCE, "x = x + self.self_attn("),
        ("llama.gather", cut_back, (TP,), "return linear_cross_entropy("),
        ("llama.gather", cut_back, FEW_HEADS, "found = F.scaled_dot_product_attention("),
        ("attention.gather", cut_back, (CP, TP), "found = F.scaled_dot_product_attention("),
    ],
    ids=[
        "column",
        "head",
        "column twice",
        "unmarked",
        "norm",
        "norm of queries",
        "norm of keys",
        "embedding",
        "row",
        "gathered hidden states",
        "gathered keys",
        "keys over cp",
    ],
)
def test_a_planted_fault_is_found_at_its_line(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    broken: Callable[..., object],
    overrides: tuple[str, ...],
    line: str,
) -> None:
    assert check(*overrides).fault is None
    monkeypatch.setattr(f"megallama.model.{name}", broken)
    fault = check(*overrides).fault
    assert fault is not None and fault.stage.index == 0
    assert line in fault.lines[-1]
    assert "axis cp" in fault.sentence if name.startswith("attention") else "axis tp" in fault.sentence


def test_a_stage_that_hands_on_another_type_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def layer(self: DecoderLayer, x: Tensor, *_: object) -> Tensor:
        return copy_to(x, self.mlp.gate_up_proj.tp)

    monkeypatch.setattr(DecoderLayer, "forward", layer)
    fault = check(*NO_SEQUENCE, "parallel.pipeline=2").fault
    assert fault is not None and fault.lines == []
    assert fault.sentence == "the hidden states for the next stage: replicate over tp and not invariant"


def test_a_function_without_types_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(_ColumnLinear, "spmd_typecheck")
    fault = check(TP).fault
    assert fault is not None and "_ColumnLinear" in fault.sentence


def test_the_command_exits_with_1_and_says_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["verify", CONFIG, "--types", "--gpus", "4", *NO_SEQUENCE]
    right = CliRunner().invoke(app, arguments)
    assert right.exit_code == 0 and "every type fits" in right.stdout
    assert json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["mesh"]["dp"] == 2
    monkeypatch.setattr("megallama.model.layers.column_linear", uncopied)
    wrong = CliRunner().invoke(app, arguments)
    assert wrong.exit_code == 1
    assert "megallama/model/layers.py" in wrong.stdout and "Invariant type on axis tp" in wrong.stdout
    assert not json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)["passed"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--types", "--layouts", "tp2"], "--layouts does not go with --types, which trains nothing"),
        (["--types", "--steps", "5"], "--steps does not go with --types, which trains nothing"),
        (["--gpus", "4"], "--gpus needs --types"),
        (["--types", "--gpus", "3", TP], "a world size of 3 is not a multiple of"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], sentence: str) -> None:
    refused = CliRunner().invoke(app, ["verify", CONFIG, *words]).exception
    assert isinstance(refused, UserError) and str(refused).startswith(sentence)


def test_without_the_package_the_command_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "megallama.verify.types")
    monkeypatch.setitem(sys.modules, "spmd_types", None)  # importing it raises ModuleNotFoundError
    refused = CliRunner().invoke(app, ["verify", CONFIG, "--types"]).exception
    assert str(refused) == "--types needs the package spmd_types; pip install 'megallama[types]'"


def test_training_imports_nothing_of_the_checker() -> None:
    code = "import sys, megallama.model.stages, megallama.verify.verify; sys.exit('spmd_types' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
