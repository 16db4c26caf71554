"""Runs whose batch grows: one answer at every layout, and exact positions, wherever a run is stopped and goes on."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.data.loader import Loader
from megallama.data.source import open_source
from tests.launching import arguments, events, losses, pretrain
from tests.train.test_tokens import record, rows

SEQUENCE = 32
POSITIONS = [4, 8, 16, 24, 32, 44, 56]
"""Of batches 4, 8 and 12, which change at 8 sequences, and at 30 that the fifth step alone passes."""
STAGES = f"{{global_batch_size: 4, until: {5 * SEQUENCE}}}, {{global_batch_size: 8, until: {30 * SEQUENCE}}}"
RAMP = [
    f"train.batch_ramp=[{STAGES}]",
    *("train.global_batch_size=12", "train.steps=null", f"train.tokens={56 * SEQUENCE}"),
    *("checkpoint.every=1", "checkpoint.keep=9", "evaluation.every=0", "schedule.warmup_steps=2"),
]


@pytest.fixture(scope="module")
def straight(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of one process, and the rows that it trained on."""
    home = tmp_path_factory.mktemp("ramp")
    words = arguments(byte_dataset, home / "run", *RAMP)
    assert pretrain(1, words, plant=partial(record, str(home)), log=home / "log") == [(0, "")]
    return home


def test_every_step_takes_the_batch_of_the_position_where_it_begins(straight: Path, byte_dataset: str) -> None:
    found = events(straight / "run", "train")
    assert [event["samples"] for event in found] == POSITIONS
    assert [event["tokens"] for event in found] == [SEQUENCE * position for position in POSITIONS]
    assert [event["global_batch_size"] for event in found] == [4, 4, 8, 8, 8, 12, 12]
    assert [event["total_steps"] for event in found] == [7] * 7
    for event in found:
        assert event["tokens_per_second"] == pytest.approx(event["global_batch_size"] * SEQUENCE / event["seconds"])
        left = (56 - event["samples"]) / event["global_batch_size"] * event["seconds"]
        assert event["seconds_left"] == pytest.approx(left)
    words = arguments(byte_dataset, straight / "run", *RAMP)
    config = load_config(words[1], words[2:])
    one = Loader(open_source(config.data, "train", config.train.seed, config.model.vocab_size), 1, lambda _: 1)
    assert rows(straight) == [tuple(one.step(sample)[0].tokens[0].tolist()) for sample in range(56)]


@pytest.mark.parametrize(
    "layout",
    [
        ["zero.stage=2", "train.micro_batch_size=1"],
        pytest.param(["zero.stage=1"], marks=pytest.mark.layouts),
        pytest.param(["zero.stage=3"], marks=pytest.mark.layouts),
    ],
)
def test_two_copies_train_on_the_same_samples_to_the_same_losses(
    layout: list[str], straight: Path, byte_dataset: str, tmp_path: Path
) -> None:
    words = arguments(byte_dataset, tmp_path / "run", *RAMP, *layout)
    assert pretrain(2, words, plant=partial(record, str(tmp_path))) == [(0, "")] * 2
    assert sorted(rows(tmp_path)) == sorted(rows(straight))
    assert_same_run(tmp_path / "run", straight / "run")


def test_stages_of_a_pipeline_run_every_number_of_micro_batches(
    straight: Path, byte_dataset: str, tmp_path: Path
) -> None:
    words = arguments(byte_dataset, tmp_path / "run", *RAMP, "parallel.pipeline=2", "train.micro_batch_size=2")
    assert pretrain(2, words) == [(0, "")] * 2
    assert_same_run(tmp_path / "run", straight / "run")


@pytest.mark.layouts
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"])
def test_two_by_two_ranks_train_to_the_same_losses(schedule: str, byte_dataset: str, tmp_path: Path) -> None:
    layers = ["model.num_hidden_layers=4", "train.micro_batch_size=1"]
    grid = [f"parallel.schedule={schedule}", "parallel.tensor=2", "parallel.pipeline=2"]
    for name, ranks, more in (("one", 1, []), ("grid", 4, grid)):
        words = arguments(byte_dataset, tmp_path / name, *RAMP, *layers, *more)
        assert pretrain(ranks, words) == [(0, "")] * ranks
    assert_same_run(tmp_path / "grid", tmp_path / "one")


def assert_same_run(found: Path, expected: Path) -> None:
    kept = ("step", "samples", "global_batch_size", "total_steps", "lr")
    facts = [[[event[key] for key in kept] for event in events(run, "train")] for run in (found, expected)]
    assert facts[0] == facts[1]
    assert losses(found) == pytest.approx(losses(expected), rel=2e-5)
    assert norms(found) == pytest.approx(norms(expected), rel=1e-4)


def norms(run: Path) -> list[float]:
    return [event["grad_norm"] for event in events(run, "train")]


@pytest.mark.parametrize("step", [1, 5, *(pytest.param(step, marks=pytest.mark.layouts) for step in (2, 4))])
def test_a_run_that_goes_on_from_any_step_is_the_same_to_the_bit(
    step: int, straight: Path, byte_dataset: str, tmp_path: Path
) -> None:
    """Within a stage, at its end, and where the step before has passed it."""
    checkpoint = f"checkpoints/step_{step:08}"
    shutil.copytree(straight / "run" / checkpoint, tmp_path / "run" / checkpoint)
    assert pretrain(1, arguments(byte_dataset, tmp_path / "run", *RAMP, "checkpoint.resume=must")) == [(0, "")]
    kept = ("step", "samples", "global_batch_size", "total_steps", "lr", "loss", "grad_norm")
    again, before = (
        [[e[key] for key in kept] for e in events(run, "train")] for run in (tmp_path / "run", straight / "run")
    )
    assert again == before[step:]


def test_going_back_to_a_stage_that_does_not_fit_is_refused(straight: Path, byte_dataset: str, tmp_path: Path) -> None:
    """Though the batch fits where the newest checkpoint stands; and nothing is undone."""
    folder, names = tmp_path / "run/checkpoints", ["step_00000001", "step_00000006"]
    for name in names:
        shutil.copytree(straight / "run/checkpoints" / name, folder / name)
    words = ["train.micro_batch_size=12", f"checkpoint.resume={folder / names[0]}"]
    ((code, said),) = pretrain(1, arguments(byte_dataset, tmp_path / "run", *RAMP, *words))
    assert code == 2
    assert "train.batch_ramp[0].global_batch_size=4 is not a number of micro-batches" in said
    assert sorted(path.name for path in folder.iterdir()) == names
