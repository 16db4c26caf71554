"""The first screen of a plan: short, and nothing on it that the whole plan does not say."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megallama.cli import app
from megallama.config.load import load_config
from megallama.hardware.gpus import find_gpu, load_hardware
from megallama.plan.asked import Asked
from megallama.plan.report.answers import timed_on
from megallama.plan.report.summary import summarise

CONFIGS = Path(__file__).parents[2] / "configs"
PLANNED = {"7b": (128, "a100-80g"), "8b": (64, "h100-80g"), "70b": (512, "h100-80g"), "405b": (16384, "h100-80g")}
GIB = 1 << 30


def screen(*words: str) -> str:
    return CliRunner().invoke(app, ["plan", *words]).stdout


def planned(*words: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(CliRunner().invoke(app, ["plan", *words, "--json"]).stdout)
    return found


def command(name: str) -> list[str]:
    gpus, gpu = PLANNED[name]
    return [str(CONFIGS / f"{name}.yaml"), f"--gpus={gpus}", f"--gpu={gpu}"]


@pytest.mark.parametrize(
    ("name", "gpu", "micro_batch"), [*product(PLANNED, ("a100-40g", "h100", "h200", "b200", "mi300x"), (1, 16))]
)
def test_it_is_a_screen(name: str, gpu: str, micro_batch: int) -> None:
    config = load_config(CONFIGS / f"{name}.yaml", [f"train.micro_batch_size={micro_batch}"])
    found = find_gpu(gpu, load_hardware(None))
    gpus = PLANNED[name][0]
    timed = timed_on(config, gpus, found, Asked())
    lines = summarise(config, gpus, found, timed, tokens=3e12, price=2.5).render().splitlines()
    assert len(lines) <= 20
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize("name", PLANNED)
def test_its_figures_are_those_of_the_plan(name: str) -> None:
    said, plan = screen(*command(name), "--price=2"), planned(*command(name), "--price=2")
    step, fit, speed = plan["step_time"], plan["fit"], plan["speed"]
    assert f"fits with {fit['free'] / GIB:.1f} GiB left: {fit['needed'] / GIB:.1f} GiB" in said
    assert f"MFU {speed['mfu_full']:.1f} %" in said
    assert amount_after("time", said) == pytest.approx(plan["cost"]["days"], rel=0.005)
    assert amount_before(" GPU-hours", said) == pytest.approx(plan["cost"]["gpu_hours"], rel=0.005)
    assert amount_before(" at 2 per GPU-hour", said) == pytest.approx(plan["cost"]["money"], rel=0.005)
    assert amount_before(" tokens/s", said) == pytest.approx(speed["tokens_per_second"], rel=0.005)
    assert amount_before(" per parameter", said) == pytest.approx(plan["batch"]["tokens_per_parameter"], rel=0.005)
    shares = dict(re.findall(r"(\w+) (\d+) %[,\n]", said[said.index("step ") :]))
    assert {"compute", "optimizer"} <= shares.keys()
    for part in shares:
        assert int(shares[part]) == pytest.approx(100 * step[part] / step["total"], abs=0.51)


@pytest.mark.parametrize("name", PLANNED)
def test_a_change_does_what_is_said_of_it(name: str) -> None:
    """It is typed, and the plan of the changed run compared."""
    now, said = planned(*command(name)), screen(*command(name))
    changes = re.findall(
        r"(\w+\.\w+=\w+) \(now \w+\): (\d+) % faster(?:,\s+(frees|takes)\s+([\d.]+) GiB)?,\s+fits", said
    )
    assert 1 <= len(changes) <= 2
    for typed, percent, way, gib in changes:
        then = planned(*command(name), typed)
        assert 100 * (1 - then["step_time"]["total"] / now["step_time"]["total"]) == pytest.approx(
            int(percent), abs=0.51
        )
        more = (then["fit"]["needed"] - now["fit"]["needed"]) / GIB
        assert more == pytest.approx({"frees": -1, "takes": 1, "": 0}[way] * float(gib or 0), abs=0.051)
        assert then["fit"]["free"] >= 0
        assert then["changes"] != now["changes"]


def test_what_does_not_fit_is_told_with_changes_that_make_it_fit() -> None:
    said = screen(str(CONFIGS / "70b.yaml"), "--gpus=64", "--gpu=a100-40g")
    assert re.search(r"^memory  does not fit by 1.4 GiB: 40.2 GiB on pipeline rank 0, 38.8 GiB usable$", said, re.M)
    assert re.search(
        r"^better  train.recompute=offload \(now selective\): \d+ % slower, frees [\d.]+ GiB,\s+fits$", said, re.M
    )


def test_a_pipeline_that_mostly_waits_is_called_poor() -> None:
    assert "Poor: the pipeline waits for 47 % of each step. Try --search." in screen(*command("405b"))
    assert "Poor" not in screen(*command("70b"))


def test_a_layout_that_a_change_makes_twice_as_fast_is_called_poor() -> None:
    said = screen(str(CONFIGS / "8b.yaml"), "parallel.tensor=16", "--gpus=64", "--gpu=h100")
    assert re.search(r"\nbetter  parallel.tensor=8 \(now 16\): 5\d % faster", said)
    assert re.search(r"\nPoor: a single change makes it 2.\d times as fast. Try --search.\n", said)


def test_without_a_kind_of_gpu_there_is_memory_and_the_way_to_the_rest() -> None:
    said = screen(str(CONFIGS / "7b.yaml"), "--gpus=128")
    assert "memory  28.6 GiB on pipeline rank 0; --gpu h100 says whether it" in said
    assert "tokens/s" not in said


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("--software=lama-2", "--software=lama-2 is not known; did you mean llama-2?"),
        ("--mfu=40", "--mfu=40 is not a number from 0.01 to 1; did you mean 0.4?"),
        ("--price=$2", "did you mean 2?"),
    ],
)
def test_what_is_mistyped_is_refused_before_anything_is_printed(word: str, sentence: str) -> None:
    result = CliRunner().invoke(app, ["plan", *command("7b"), word])
    assert (result.stdout, result.exit_code) == ("", 1)
    assert sentence in str(result.exception)


def test_an_assumed_mfu_stands_where_no_constant_is_known_and_is_said_to_be_assumed() -> None:
    said = screen(str(CONFIGS / "8b.yaml"), "--gpus=64", "--gpu=b200", "--mfu=0.35")
    assert "MFU 35.0 %" in said
    assert re.search(r"^step    [\d.]+ s: at the MFU that --mfu assumes$", said, re.M)
    assert "better" not in said


def amount_after(label: str, said: str) -> float:
    return _amount(re.search(rf"^{label} +([\d.,]+)([KMBT]?)", said, re.M))


def amount_before(unit: str, said: str) -> float:
    return _amount(re.search(rf"([\d.,]+)([KMBT]?){unit}", said))


def _amount(found: re.Match[str] | None) -> float:
    assert found is not None
    return float(found[1].replace(",", "")) * {"": 1, "M": 1e6, "B": 1e9, "T": 1e12}[found[2]]
