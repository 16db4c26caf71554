"""Traces of chosen steps on chosen ranks, from real runs, read back as Perfetto reads them."""

from __future__ import annotations

import gzip
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import megallama.train.profile
from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.layout.check import check_training
from tests.faults.asking import MAY_MOUNT
from tests.launching import CONFIG, PRETRAIN, arguments, events, execute, pretrain

SLOW_SECONDS = 3.0


def words(dataset: str, run: Path, *more: str) -> list[str]:
    return arguments(dataset, run, "evaluation.every=0", "checkpoint.every=0", *more)


def read(path: Path) -> set[str]:
    """Names of what a trace holds."""
    trace: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    return {event["name"] for event in trace["traceEvents"]}


def files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "traces").iterdir())


def test_the_listed_ranks_trace_the_listed_steps(byte_dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["parallel.tensor=2", "train.profile={steps: [2, 4, 9], ranks: [0, 1]}"]
    assert pretrain(2, words(byte_dataset, run, *more)) == [(0, "")] * 2
    names = [f"step_0000000{step}_rank_0000{rank}.json.gz" for step in (2, 4) for rank in (0, 1)]
    assert files(run) == names, "the run has no step 9"
    assert [(event["step"], event["paths"]) for event in events(run, "profile")] == [
        (step, [str(run / "traces" / name) for name in names if f"{step}_rank" in name]) for step in (2, 4)
    ]
    for name in names:
        found = read(run / "traces" / name)
        assert {"aten::mm", "forward", "backward", "tensor", "optimizer"} <= found
        assert any("all_reduce" in each for each in found), "the sums of tensor parallelism"
        assert any("backward" in each.lower() for each in found)


def plant_slow_profiler() -> None:
    """A profiler takes seconds to start, and seconds to write what it has seen."""
    module: Any = megallama.train.profile
    for name in ("_prepared", "_written"):
        setattr(module, name, slowed(getattr(module, name)))


def slowed(function: Callable[..., Any]) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        time.sleep(SLOW_SECONDS)
        return function(*arguments)

    return slow


def test_no_step_of_another_rank_takes_the_time_of_a_profiler(byte_dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["train.profile={steps: [2], ranks: [1]}"]
    assert pretrain(2, words(byte_dataset, run, *more), plant=plant_slow_profiler) == [(0, "")] * 2
    assert files(run) == ["step_00000002_rank_00001.json.gz"]
    trained = events(run, "train")
    assert [event["step"] for event in trained] == [1, 2, 3, 4]
    assert trained[1]["time"] - trained[0]["time"] > 2 * SLOW_SECONDS, "rank 0 has waited for it"
    assert max(event["seconds"] for event in trained) < SLOW_SECONDS


@pytest.mark.skipif(not MAY_MOUNT, reason="this user may not mount a small disk")
@pytest.mark.parametrize("place", ["traces", "temporary"])
def test_a_full_disk_is_a_notice_and_the_run_goes_on(place: str, byte_dataset: str, tmp_path: Path) -> None:
    run, temporary = tmp_path / "run", tmp_path / "temporary"
    for folder in (run / "traces", temporary):
        folder.mkdir(parents=True)
    disk = {"traces": run / "traces", "temporary": temporary}[place]
    start = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=16k none {disk} && exec "$@"', "sh"]
    command = [sys.executable, PRETRAIN, *words(byte_dataset, run, "train.profile.steps=[2]")]
    done = execute([*start, *command], tmp_path, TMPDIR=str(temporary))
    assert done.code == 0, done.err
    (text,) = (event["text"] for event in events(run, "notice"))
    said = {"traces": "(No space left on device); ", "temporary": "(torch's profiler could not write it to "}[place]
    assert text.startswith(f"the trace of step 2 is not written on rank 0 {said}")
    assert events(run, "profile") == []
    assert files(run) == []
    assert [event["step"] for event in events(run, "train")] == [1, 2, 3, 4]


def test_a_step_that_is_trained_again_overwrites_its_trace(byte_dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    profile = "train.profile.steps=[2, 3]"
    assert pretrain(1, words(byte_dataset, run, profile, "train.stop_after=2")) == [(0, "")]
    (old,) = (run / "traces").iterdir()
    before = old.read_bytes()
    assert pretrain(1, words(byte_dataset, run, profile)) == [(0, "")], "step 2 is behind this start"
    assert old.read_bytes() == before
    assert files(run) == [f"step_0000000{step}_rank_00000.json.gz" for step in (2, 3)]
    assert pretrain(1, words(byte_dataset, run, profile, "checkpoint.resume=never")) == [(0, "")]
    assert old.read_bytes() != before
    assert len(files(run)) == 2


def test_a_rank_that_is_not_there_is_refused_with_the_last_one() -> None:
    config = load_config(CONFIG, ["train.profile={steps: [1], ranks: [0, 8]}", "parallel.tensor=2"])
    with pytest.raises(UserError) as refused:
        check_training(config, 2)
    assert str(refused.value) == (
        "train.profile.ranks[1]=8 is no rank of a world size of 2; nearest legal: train.profile.ranks[1]=1"
    )
    check_training(load_config(CONFIG, ["train.profile={steps: [1], ranks: [0, 1]}", "parallel.tensor=2"]), 2)


def test_a_value_of_another_shape_is_refused_with_one_that_goes() -> None:
    for words, expected in {
        "train.profile={ranks: []}": "train.profile.ranks=[] is not legal; expected a list of 1 to 1000 ranks such as",
        "train.profile.steps=[[3]]": "expected a whole number",
        "train.profile=10": "train.profile=10 is not legal; expected a mapping of keys such as {steps: [10, 12]}",
        "train.average=latest": "train.average=latest is not legal; expected a mapping of keys such as {kind: expone",
    }.items():
        with pytest.raises(UserError, match=re.escape(expected)):
            load_config(CONFIG, [words])


@pytest.mark.parametrize(
    "words", ["{steps: [0]}", "{steps: [10, -1]}", "{ranks: [-1]}", "{steps: 5}", "{steps: [1.5]}"]
)
def test_steps_and_ranks_are_whole_numbers_from_the_first_on(words: str) -> None:
    with pytest.raises(UserError, match=r"train\.profile\.(steps|ranks)"):
        load_config(CONFIG, [f"train.profile={words}"])
