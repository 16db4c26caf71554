"""What the sizing flags ask, and the sentence for each way to get them wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
from typer.testing import CliRunner

from megallama.cli import app
from megallama.errors import UserError
from megallama.plan.sizing.flags import Flags, read_flags


@pytest.mark.parametrize(
    ("flags", "flops", "parameters", "tokens"),
    [
        (Flags(flops="1e21"), 1e21, None, None),
        (Flags(params="7B"), None, 7e9, None),
        (Flags(params="135m"), None, 135e6, None),
        (Flags(tokens="2T"), None, None, 2e12),
        (Flags(params="7e9", tokens="2000G"), None, 7e9, 2e12),
    ],
)
def test_a_question_is_one_budget_or_a_size_with_its_data(
    flags: Flags, flops: float | None, parameters: float | None, tokens: float | None
) -> None:
    question = read_flags(flags)
    assert (question.flops, question.parameters, question.tokens) == (flops, parameters, tokens)
    assert question.asks


def test_gpus_for_days_are_a_compute_at_an_assumed_share_of_the_peak() -> None:
    assumed = read_flags(Flags(gpus="64", days="30"))
    assert assumed.flops == pytest.approx(64 * 30 * 86_400 * 989.4e12 * 0.4)
    told = read_flags(Flags(gpus="64", days="30", gpu="a100-80g", mfu="0.5"))
    assert told.flops == pytest.approx(64 * 30 * 86_400 * 312e12 * 0.5)


RATIOS = {
    "a size": (Flags(params="7B"), 7e9, 140e9),
    "data": (Flags(tokens="140B"), 7e9, 140e9),
    "a compute": (Flags(flops="5.88e21"), 7e9, 140e9),
    "GPUs and days": (Flags(gpus="64", days="30"), 2.339e10, 4.678e11),
}


@pytest.mark.parametrize("given", RATIOS)
def test_a_ratio_of_tokens_settles_the_rest(given: str) -> None:
    flags, parameters, tokens = RATIOS[given]
    pair = read_flags(replace(flags, tokens_per_param="20")).fixed_ratio()
    assert pair == (pytest.approx(parameters, rel=1e-3), pytest.approx(tokens, rel=1e-3))


def test_a_sized_run_takes_gpu_hours_at_an_assumed_share_of_the_peak() -> None:
    """184,320 GPU-hours of A100s at 0.391 of the peak are Llama 2 7B (its model card)."""
    compute = read_flags(Flags(params="6.738B", tokens="2T", gpu="a100", gpus="1024", mfu="0.391")).compute
    assert compute is not None
    assert compute.gpu_hours(6 * 6_738_415_616 * 2e12) == pytest.approx(184_320, rel=3e-3)
    assert compute.flops(184_320 / 1024 / 24) == pytest.approx(6 * 6_738_415_616 * 2e12, rel=3e-3)
    assert compute.gpu_hours(compute.flops(30)) == pytest.approx(1024 * 30 * 24)


@pytest.mark.parametrize(
    ("gpu", "peak"),
    [("a100-40g", 312e12), ("h100", 989.4e12), ("H100-80G", 989.4e12), ("h100-pcie", 756e12), ("h100-nvl", 835e12),
     ("h200", 989.4e12), ("gh200", 989.4e12), ("b200", 2250e12), ("mi300x", 1307e12), ("l40s", 362e12)],
)  # fmt: skip
def test_published_peaks_by_short_name(gpu: str, peak: float) -> None:
    compute = read_flags(Flags(params="7B", gpu=gpu)).compute
    assert compute is not None and compute.peak == peak


def test_no_flag_is_no_question() -> None:
    assert not read_flags(Flags()).asks
    assert read_flags(Flags()).vocab_size == 32_000


WRONG: list[tuple[Flags, str]] = [
    (Flags(flops="0"), "--flops=0 is not a number from 6e6 to 1e30; nearest legal: 6e6"),
    (Flags(flops="-1e21"), "--flops=-1e21 is not a number from 6e6 to 1e30; did you mean 1e21?"),
    (Flags(flops="many"), "--flops=many is not a number from 6e6 to 1e30; write it as 1e21"),
    (Flags(flops=""), "--flops= is not a number from 6e6 to 1e30; write it as 1e21"),
    (Flags(flops="nan"), "--flops=nan is not a number from 6e6 to 1e30; write it as 1e21"),
    (Flags(flops="inf"), "--flops=inf is not a number from 6e6 to 1e30; nearest legal: 1e30"),
    (Flags(params="0"), "--params=0 is not a number from 1 to 1e30; nearest legal: 1"),
    (Flags(params="-7B"), "--params=-7B is not a number from 1 to 1e30; did you mean 7B?"),
    (Flags(params="7X"), "--params=7X is not a number from 1 to 1e30; write it as 7e9 or 7B"),
    (Flags(tokens="0.0"), "--tokens=0.0 is not a number from 1 to 1e30; nearest legal: 1"),
    (Flags(tokens="-2T"), "--tokens=-2T is not a number from 1 to 1e30; did you mean 2T?"),
    (Flags(tokens="1e31"), "--tokens=1e31 is not a number from 1 to 1e30; nearest legal: 1e30"),
    (Flags(gpus="0", days="30"), "--gpus=0 is not a whole number from 1 to 10000000; nearest legal: 1"),
    (Flags(gpus="-8", days="30"), "--gpus=-8 is not a whole number from 1 to 10000000; did you mean 8?"),
    (Flags(gpus="6.5", days="30"), "--gpus=6.5 is not a whole number from 1 to 10000000; nearest legal: 6 or 7"),
    (Flags(gpus="inf", days="30"), "--gpus=inf is not a whole number from 1 to 10000000; nearest legal: 10000000"),
    (Flags(gpus="8", days="0"), "--days=0 is not a number from 0.01 to 100000; nearest legal: 0.01"),
    (Flags(gpus="8", days="-30"), "--days=-30 is not a number from 0.01 to 100000; did you mean 30?"),
    (Flags(gpus="8", days="a month"), "--days=a month is not a number from 0.01 to 100000; write it as 30"),
    (Flags(gpus="8", days="3", mfu="40"), "--mfu=40 is not a number from 0.01 to 1; did you mean 0.4?"),
    (Flags(gpus="8", days="3", mfu="1.5"), "--mfu=1.5 is not a number from 0.01 to 1; nearest legal: 1"),
    (Flags(gpus="8", days="3", mfu="-1.5"), "--mfu=-1.5 is not a number from 0.01 to 1; nearest legal: 0.01"),
    (Flags(gpus="-6.5", days="30"), "--gpus=-6.5 is not a whole number from 1 to 10000000; nearest legal: 1"),
    (Flags(gpus="8", days="3", mfu="0"), "--mfu=0 is not a number from 0.01 to 1; nearest legal: 0.01"),
    (Flags(gpus="8", days="3", mfu="-0.4"), "--mfu=-0.4 is not a number from 0.01 to 1; did you mean 0.4?"),
    (Flags(gpus="8", days="3", gpu="h300"), "the GPU h300 is not known; did you mean h"),
    (Flags(params="7B", unique_tokens="0"), "--unique-tokens=0 is not a number from 1 to 1e30; nearest legal: 1"),
    (
        Flags(params="7B", vocab="-32000"),
        "--vocab=-32000 is not a whole number from 1 to 1000000000; did you mean 32000?",
    ),
    (Flags(gpus="64"), "--gpus=64 alone is no compute; add --days 30, or leave it out"),
    (Flags(days="30"), "--days=30 alone is no compute; add --gpus 64, or leave it out"),
    (Flags(mfu="0.4"), "--mfu=0.4 alone is no compute; add --gpus 64 --days 30, or leave it out"),
    (Flags(gpu="h100", days="30"), "--days=30 alone is no compute; add --gpus 64, or leave it out"),
    (Flags(gpu="h100"), "--gpu=h100 alone is no compute; add --gpus 64 --days 30, or --params 7B, or leave it out"),
    (Flags(gpu="h300", params="7B"), "the GPU h300 is not known; did you mean h"),
    (
        Flags(gpus="64", params="7B"),
        "--gpus=64 alone is no compute; add --gpu h100 for how long it takes, or leave it out",
    ),
    (Flags(price="2", params="7B"), "--price=2 alone is no compute; add --gpu h100 for how long it takes"),
    (Flags(tokens_per_param="20"), "--tokens-per-param=20 sizes nothing alone; add --params 7B, or leave it out"),
    (
        Flags(tokens_per_param="20", params="7B", tokens="1T"),
        "--tokens-per-param=20 contradicts --params=7B --tokens=1T; leave one of them out",
    ),
    (
        Flags(tokens_per_param="20", flops="1e21", params="7B"),
        "--tokens-per-param=20 contradicts --flops=1e21 --params=7B; leave one of them out",
    ),
    (
        Flags(tokens_per_param="20", flops="1e21", tokens="1T"),
        "--tokens-per-param=20 contradicts --flops=1e21 --tokens=1T; leave one of them out",
    ),
    (
        Flags(tokens_per_param="20", gpus="64", days="30", params="7B"),
        "--params=7B contradicts --gpus=64 --days=30, which is 6.565e+22 FLOPs; leave one of them out",
    ),
    (Flags(tokens_per_param="20", gpu="h100"), "--gpu=h100 alone is no compute; add --gpus 64 --days 30, or --params"),
    (Flags(tokens_per_param="0", params="7B"), "--tokens-per-param=0 is not a number from 0.01 to 1e6; nearest legal"),
    (Flags(tokens_per_param="-20", params="7B"), "--tokens-per-param=-20 is not a number from 0.01 to 1e6; did you"),
    (
        Flags(tokens_per_param="few", params="7B"),
        "--tokens-per-param=few is not a number from 0.01 to 1e6; write it as",
    ),
    (Flags(params="7B", gpu="h100", gpus="0"), "--gpus=0 is not a whole number from 1 to 10000000; nearest legal: 1"),
    (Flags(params="7B", gpu="h100", price="-2"), "--price=-2 is not a number from 0 to 1e9; did you mean 2?"),
    (Flags(params="7B", gpu=""), "the GPU  is not known; known: "),
    (
        Flags(gpus="64", days="30", flops="1e21"),
        "--flops=1e21 contradicts --gpus=64 --days=30, which is 6.565e+22 FLOPs; leave one of them out",
    ),
    (
        Flags(gpus="64", days="30", tokens="1T"),
        "--tokens=1T contradicts --gpus=64 --days=30, which is 6.565e+22 FLOPs; leave one of them out",
    ),
    (
        Flags(flops="1e21", params="7B"),
        "--flops=1e21 contradicts --params=7B, since either sizes the other; leave one of them out, or type "
        "--tokens=2.381e+10 in place of --flops=1e21 for the same compute",
    ),
    (
        Flags(flops="1e21", tokens="1T"),
        "--flops=1e21 contradicts --tokens=1T, since either sizes the other; leave one of them out, or type "
        "--params=1.667e+08 in place of --flops=1e21 for the same compute",
    ),
    (
        Flags(flops="1e21", params="7B", tokens="1T"),
        "--flops=1e21 contradicts --params=7B --tokens=1T, which take 6 * N * D = 4.2e+22 FLOPs; leave it out",
    ),
]


@pytest.mark.parametrize(("flags", "sentence"), WRONG, ids=lambda case: case if isinstance(case, str) else "")
def test_a_wrong_flag_is_named_with_the_nearest_fix(flags: Flags, sentence: str) -> None:
    with pytest.raises(UserError) as refused:
        read_flags(flags)
    assert str(refused.value).startswith(sentence)


def test_no_fix_is_offered_that_would_itself_be_refused() -> None:
    with pytest.raises(UserError) as refused:
        read_flags(Flags(flops="1e9", params="7B"))
    assert str(refused.value).endswith("since either sizes the other; leave one of them out")


def test_the_fix_for_a_compute_with_a_size_takes_that_compute() -> None:
    question = read_flags(Flags(params="7B", tokens="2.381e+10"))
    assert question.parameters is not None and question.tokens is not None
    assert 6 * question.parameters * question.tokens == pytest.approx(1e21, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--params=7"], "--params=7 is 7, fewer than any model has; did you mean 7B?"),
        (["--tokens=2"], "--tokens=2 is 2, fewer than any model has; did you mean 2T?"),
        (["configs/7b.yaml", "--gpus=128", "--gpu=h100", "--price=$2"], "; did you mean 2?"),
    ],
)
def test_a_forgotten_unit_and_a_currency_are_asked_about(words: list[str], sentence: str) -> None:
    error = CliRunner().invoke(app, ["plan", *words]).exception
    assert isinstance(error, UserError)
    assert str(error).endswith(sentence)
