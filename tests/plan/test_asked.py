"""The words of `megallama plan`: what they ask, and the sentence for each way to get them wrong."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
from typer.testing import CliRunner

from megallama.cli import app
from megallama.errors import UserError
from megallama.plan.asked import TAKEN, Asked
from megallama.plan.sizing.question import Question, read_question

BUDGET = {"gpus": "64", "gpu": "h100", "days": "30"}
CONFIG = "configs/7b.yaml"


def question(**words: Any) -> Question:
    asked = Asked(**words)
    asked.check_words()
    return read_question(asked)


@pytest.mark.parametrize(
    ("words", "given", "amount"),
    [
        ({"flops": "1e21"}, "flops", 1e21),
        ({"params": "7B"}, "parameters", 7e9),
        ({"params": "135m"}, "parameters", 135e6),
        ({"tokens": "2T"}, "tokens", 2e12),
        (BUDGET, "flops", 64 * 30 * 86_400 * 989.4e12 * 0.4),
        ({**BUDGET, "gpu": "a100-80g", "mfu": "0.5"}, "flops", 64 * 30 * 86_400 * 312e12 * 0.5),
    ],
)
def test_a_question_is_one_budget(words: dict[str, str], given: str, amount: float) -> None:
    found = question(**words)
    assert found.pair is None
    assert found.quantities == {given: pytest.approx(amount)}


def test_a_size_with_its_data_is_a_pair() -> None:
    assert question(params="7e9", tokens="2000G").pair == (7e9, 2e12)


RATIOS = {
    "a size": ({"params": "7B"}, 7e9, 140e9),
    "data": ({"tokens": "140B"}, 7e9, 140e9),
    "a compute": ({"flops": "5.88e21"}, 7e9, 140e9),
    "GPUs and days": (BUDGET, 2.339e10, 4.678e11),
}


@pytest.mark.parametrize("given", RATIOS)
def test_a_ratio_of_tokens_settles_the_rest(given: str) -> None:
    words, parameters, tokens = RATIOS[given]
    pair = question(**words, tokens_per_param="20").pair
    assert pair == (pytest.approx(parameters, rel=1e-3), pytest.approx(tokens, rel=1e-3))


def test_a_sized_run_takes_gpu_hours_at_an_assumed_share_of_the_peak() -> None:
    """184,320 GPU-hours of A100s at 0.391 of the peak are Llama 2 7B (its model card)."""
    compute = question(params="6.738B", tokens="2T", gpu="a100", gpus="1024", mfu="0.391").compute
    assert compute is not None
    assert compute.gpu_hours(6 * 6_738_415_616 * 2e12) == pytest.approx(184_320, rel=3e-3)
    assert compute.flops(184_320 / 1024 / 24) == pytest.approx(6 * 6_738_415_616 * 2e12, rel=3e-3)


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [("a100-40g", 312e12), ("h100", 989.4e12), ("H100-80G", 989.4e12), ("h100-pcie", 756e12), ("h100-nvl", 835e12),
     ("h200", 989.4e12), ("gh200", 989.4e12), ("b200", 2250e12), ("mi300x", 1307e12), ("l40s", 362e12)],
)  # fmt: skip
def test_published_peaks_by_short_name(gpu: str, peak: float) -> None:
    compute = question(params="7B", gpu=gpu).compute
    assert compute is not None and compute.peak == peak


WHOLE, HIGH = "is not a whole number from 1 to 10000000", "nearest legal: 10000000"
WRONG: list[tuple[dict[str, str], str]] = [
    ({"flops": "0"}, "--flops=0 is not a number from 6e6 to 1e30; nearest legal: 6e6"),
    ({"flops": "-1e21"}, "--flops=-1e21 is not a number from 6e6 to 1e30; did you mean 1e21?"),
    ({"flops": "many"}, "--flops=many is not a number from 6e6 to 1e30; write it as 1e21"),
    ({"flops": ""}, "--flops= is not a number from 6e6 to 1e30; write it as 1e21"),
    ({"flops": "nan"}, "--flops=nan is not a number from 6e6 to 1e30; write it as 1e21"),
    ({"flops": "inf"}, "--flops=inf is not a number from 6e6 to 1e30; nearest legal: 1e30"),
    ({"params": "0"}, "--params=0 is not a number from 1 to 1e30; nearest legal: 1"),
    ({"params": "-7B"}, "--params=-7B is not a number from 1 to 1e30; did you mean 7B?"),
    ({"params": "7X"}, "--params=7X is not a number from 1 to 1e30; write it as 7e9 or 7B"),
    ({"params": "7"}, "--params=7 is 7, fewer than any model has; did you mean 7B?"),
    ({"tokens": "2"}, "--tokens=2 is 2, fewer than any model has; did you mean 2T?"),
    ({"tokens": "1e31"}, "--tokens=1e31 is not a number from 1 to 1e30; nearest legal: 1e30"),
    ({**BUDGET, "gpus": "0"}, f"--gpus=0 {WHOLE}; nearest legal: 1"),
    ({**BUDGET, "gpus": "-8"}, f"--gpus=-8 {WHOLE}; did you mean 8?"),
    ({**BUDGET, "gpus": "6.5"}, f"--gpus=6.5 {WHOLE}; nearest legal: 6 or 7"),
    ({**BUDGET, "gpus": "-6.5"}, f"--gpus=-6.5 {WHOLE}; nearest legal: 1"),
    ({**BUDGET, "gpus": "inf"}, f"--gpus=inf {WHOLE}; {HIGH}"),
    ({**BUDGET, "days": "0"}, "--days=0 is not a number from 0.01 to 100000; nearest legal: 0.01"),
    ({**BUDGET, "days": "-30"}, "--days=-30 is not a number from 0.01 to 100000; did you mean 30?"),
    ({**BUDGET, "days": "a month"}, "--days=a month is not a number from 0.01 to 100000; write it as 30"),
    ({**BUDGET, "mfu": "40"}, "--mfu=40 is not a number from 0.01 to 1; did you mean 0.4?"),
    ({**BUDGET, "mfu": "1.5"}, "--mfu=1.5 is not a number from 0.01 to 1; nearest legal: 1"),
    ({**BUDGET, "mfu": "-1.5"}, "--mfu=-1.5 is not a number from 0.01 to 1; nearest legal: 0.01"),
    ({**BUDGET, "price": "$2"}, "--price=$2 is not a number from 0 to 1e9; did you mean 2?"),
    ({**BUDGET, "gpu": "h300"}, "the GPU h300 is not known; did you mean h"),
    ({"params": "7B", "gpu": ""}, "the GPU  is not known; known: "),
    ({"params": "7B", "vocab": "-32000"}, "--vocab=-32000 is not a whole number from 1 to 1000000000; did you mean"),
    ({"params": "7B", "tokens_per_param": "0"}, "--tokens-per-param=0 is not a number from 0.01 to 1e6; nearest"),
]
AMISS: list[tuple[dict[str, str], str]] = [
    ({}, "nothing to plan; give a CONFIG such as configs/7b.yaml, or --flops, --params, --tokens, or --days with"),
    ({"vocab": "1000"}, "nothing to plan for --vocab=1000; give a CONFIG"),
    ({"gpu": "h100"}, "nothing to plan for --gpu=h100; give a CONFIG"),
    ({"tokens_per_param": "20"}, "nothing to plan for --tokens-per-param=20; give a CONFIG"),
    ({"days": "30"}, "--days=30 needs --gpus; add --gpus 64, or leave it out"),
    ({"days": "30", "gpus": "64"}, "--days=30 needs --gpu; add --gpu h100, or leave it out"),
    ({"params": "7B", "gpus": "64"}, "--gpus=64 needs --gpu; add --gpu h100, or leave it out"),
    ({"params": "7B", "price": "2"}, "--price=2 needs --gpu; add --gpu h100, or leave it out"),
    ({"params": "7B", "mfu": "0.4"}, "--mfu=0.4 needs --gpu; add --gpu h100, or leave it out"),
    ({"params": "7B", "flops": "1e21"}, "--flops=1e21 contradicts --params=7B, since either sizes the run; leave one"),
    ({"tokens": "1T", "flops": "1e21"}, "--flops=1e21 contradicts --tokens=1T, since either sizes the run; leave one"),
    ({"tokens": "1T", "params": "7B", "flops": "1e21"}, "--flops=1e21 contradicts --params=7B, since either sizes"),
    ({"tokens": "1T", "params": "7B", "tokens_per_param": "20"}, "--tokens-per-param=20 contradicts --params=7B, "),
    ({**BUDGET, "flops": "1e21"}, "--days=30 contradicts --flops=1e21, since either sizes the run; leave one of them"),
    ({"params": "7B", "software": "megallama", "gpu": "h100"}, "--software=megallama needs a CONFIG such as configs/"),
    ({"params": "7B", "explain": True}, "--explain needs a CONFIG such as configs/7b.yaml; give one"),
    ({"timeline": True}, "--timeline needs a CONFIG such as configs/7b.yaml; give one"),
    ({"search": True, **BUDGET}, "--search does not go with --days=30; leave one of them out"),
    ({"config_path": CONFIG, "rank": "3"}, "--rank=3 needs --check; add --check, or leave it out"),
    ({"config_path": CONFIG, "write": "a"}, "--write=a needs --search; add --search, or leave it out"),
    ({"config_path": CONFIG, "search": True, "sbatch": "a.sh"}, "--sbatch=a.sh needs --write; add --write run.yaml"),
    ({"config_path": CONFIG, "timeline": True, "write": "a"}, "--write=a needs --search; add --search, or leave it"),
    ({"config_path": CONFIG, "gpu": "h100", "mfu": "0.4", "software": "llama-2"}, "--mfu=0.4 leaves --software=llama-"),
    ({"calibrate": "runs/a", "config_path": CONFIG}, "--calibrate=runs/a does not go with configs/7b.yaml; leave one"),
    ({"calibrate": "runs/a", "software": "x"}, "--calibrate=runs/a does not go with --software=x; leave one of them"),
    (
        {"config_path": CONFIG, "write": "a\nb", "search": True},
        "--write a\\nb holds line ends",
    ),
]


@pytest.mark.parametrize(
    ("words", "sentence"), [*WRONG, *AMISS], ids=lambda case: case if isinstance(case, str) else ""
)
def test_a_wrong_word_is_named_with_the_nearest_fix(words: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        question(**words)
    assert str(refused.value).startswith(sentence)


UNUSED = {
    "--timeline": ["--gpu=x", "--hardware=none", "--software=x", "--price=", "--tokens=1T", "--mfu=0.4", "--json"],
    "--check": ["--gpu=x", "--software=x", "--price=x", "--tokens=1T", "--search", "--explain"],
    "--plot=o.png": ["--software=x", "--price=x", "--tokens=1T", "--json", "--mfu=0.4"],
    "--search": ["--flops=1e21", "--days=3", "--vocab=1", "--plot=o.png", "--params=7B"],
    CONFIG: ["--days=30", "--flops=1e21", "--params=7B", "--tokens-per-param=20", "--vocab=1"],
}


@pytest.mark.parametrize(("mode", "word"), [(mode, word) for mode, words in UNUSED.items() for word in words])
def test_a_word_that_has_no_say_in_what_is_asked_is_refused(mode: str, word: str) -> None:
    used = ["--gpus=8"] if mode in ("--timeline", "--check") else ["--gpus=8", "--gpu=h100"]
    result = CliRunner().invoke(app, ["plan", CONFIG, *used, *([] if mode == CONFIG else [mode]), word])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == f"{mode} does not go with {word}; leave one of them out"


def test_every_word_has_a_use() -> None:
    assert {field.name for field in fields(Asked)} == {*TAKEN, *set().union(*TAKEN.values())} - {"run", "size"}


def test_what_was_typed_is_told_as_it_was_typed() -> None:
    asked = Asked(tokens_per_param="20", as_json=True, flops="1e21")
    assert [asked.typed(name) for name in asked.given] == ["--flops=1e21", "--tokens-per-param=20", "--json"]
    assert replace(asked, flops=None).mode == "size"
