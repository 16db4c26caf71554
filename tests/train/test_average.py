"""Averages of the weights against a plain loop over the weights that a run has saved, in float64."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from megallama.checkpoint.format import NUMBERS, complete_checkpoints, read_manifest, step_of
from megallama.checkpoint.reading.inspect import inspect
from megallama.checkpoint.state import Averaged, read_saved
from megallama.checkpoint.tensors import average_name, is_average, is_weight
from megallama.cli import app
from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.layout.frozen import checkpoint_bytes
from megallama.report.record import read_record
from megallama.verify.compare import BOUNDS, read_tensors, relative
from tests.checkpoint.damaging import edit, flip
from tests.launching import arguments, events, losses, pretrain
from tests.train import test_rewind
from tests.train.test_loop import assert_same_tensors, evaluations

DECAY, MEAN_OF = 0.25, 3
"""Reached by n / (n + 9) at the fourth update."""
EXPONENTIAL = ["train.average.kind=exponential", f"train.average.decay={DECAY}"]
LATEST = ["train.average.kind=latest", f"train.average.checkpoints={MEAN_OF}"]
LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "dp2-zero3": (2, ["zero.stage=3"]),
    "tp2": (2, ["parallel.tensor=2"]),
    "dp2-zero1-bf16": (2, ["train.dtype=bf16"]),
    "dp2-zero2": (2, ["zero.stage=2"]),
    "dp2-zero3-bf16": (2, ["zero.stage=3", "train.dtype=bf16"]),
    "cp2": (2, ["parallel.context=2"]),
    "pp2-dualpipev": (2, ["parallel.pipeline=2", "parallel.schedule=dualpipev", "train.micro_batch_size=1"]),
    "tp2-pp2-bf16": (4, ["parallel.tensor=2", "parallel.pipeline=2", "train.dtype=bf16"]),
}
IN_EVERY_RUN = ("dp2-zero3",)
FOUR_LAYERS = ["model.num_hidden_layers=4", "optimizer.lr=1e-2"]


def words(dataset: str, run_dir: Path, *more: str) -> list[str]:
    return arguments(dataset, run_dir, *FOUR_LAYERS, "train.steps=6", "checkpoint.every=1", "checkpoint.keep=8", *more)


def checkpoints(run_dir: Path) -> list[Path]:
    """All that there are, the oldest first."""
    return complete_checkpoints(run_dir / "checkpoints")[::-1]


def weights_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor.double() for name, tensor in read_tensors(path).items() if is_weight(name)}


def average_of(path: Path) -> dict[str, Tensor]:
    tensors = read_tensors(path)
    return {name: tensors[average_name(name)] for name in tensors if is_weight(name)}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        assert relative(found[name] - tensor, tensor) < 2e-7, name


def assert_exponential(run_dir: Path, decay: float) -> None:
    """From its first checkpoint on, which must be that of the first step."""
    first, *later = checkpoints(run_dir)
    expected, updates = weights_of(first), read_saved(first).state.updates
    assert (step_of(first), updates) == (1, 1)
    assert_close(average_of(first), expected)
    for path in later:
        now = read_saved(path).state.updates
        for _ in range(now - updates):
            kept = min(decay, updates / (updates + 9))
            expected = {n: kept * expected[n] + (1 - kept) * weight for n, weight in weights_of(path).items()}
        updates = now
        assert_close(average_of(path), expected)
        assert read_saved(path).average == Averaged("exponential")


def assert_latest(run_dir: Path) -> None:
    paths = checkpoints(run_dir)
    for number, path in enumerate(paths, 1):
        mean_of = paths[max(0, number - MEAN_OF) : number]
        every = [weights_of(other) for other in mean_of]
        assert_close(average_of(path), {name: sum(w[name] for w in every) / len(every) for name in every[0]})
        assert read_saved(path).average == Averaged("latest", tuple(step_of(other) for other in mean_of[::-1]))


@pytest.fixture(scope="module")
def alone(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of one process with an average of each kind."""
    folder = tmp_path_factory.mktemp("alone")
    for kind, more in (("exponential", EXPONENTIAL), ("latest", LATEST)):
        assert pretrain(1, words(byte_dataset, folder / kind, *more)) == [(0, "")]
    return {kind: folder / kind for kind in ("exponential", "latest")}


def test_each_average_is_that_of_a_plain_loop(alone: dict[str, Path]) -> None:
    assert_exponential(alone["exponential"], DECAY)
    assert_latest(alone["latest"])


def assert_same_as_alone(layout: str, alone: dict[str, Path], dataset: str, folder: Path) -> None:
    ranks, overrides = LAYOUTS[layout]
    start = weights_of(checkpoints(alone["exponential"])[0])
    for kind, more in (("exponential", EXPONENTIAL), ("latest", LATEST)):
        run_dir = folder / kind
        assert pretrain(ranks, words(dataset, run_dir, *overrides, *more)) == [(0, "")] * ranks
        if kind == "exponential":
            assert_exponential(run_dir, DECAY)
        else:
            assert_latest(run_dir)
        bounds = BOUNDS["bf16" if "bf16" in layout else "fp32"]
        ours, theirs = average_of(checkpoints(run_dir)[-1]), average_of(checkpoints(alone[kind])[-1])
        for name, tensor in theirs.items():
            assert relative(ours[name] - tensor, tensor.double() - start[name]) < bounds.update, name
        found = [[loss for _, _, loss in evaluations(where)] for where in (run_dir, alone[kind])]
        assert found[0] == pytest.approx(found[1], rel=10 * bounds.loss)


@pytest.mark.parametrize("layout", IN_EVERY_RUN)
def test_a_layout_has_the_averages_of_one_process(
    layout: str, alone: dict[str, Path], byte_dataset: str, tmp_path: Path
) -> None:
    assert_same_as_alone(layout, alone, byte_dataset, tmp_path)


@pytest.mark.layouts
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in IN_EVERY_RUN])
def test_every_layout_has_the_averages_of_one_process(
    layout: str, alone: dict[str, Path], byte_dataset: str, tmp_path: Path
) -> None:
    assert_same_as_alone(layout, alone, byte_dataset, tmp_path)


def test_an_average_goes_back_with_its_run_and_rests_where_a_step_is_skipped(byte_dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["checkpoint.every=1", "checkpoint.keep=40", "train.average.kind=exponential", "train.average.decay=0.6"]
    start = test_rewind.words(byte_dataset, run, *more)
    assert pretrain(1, start, plant=partial(test_rewind.spoiled, test_rewind.BAD)) == [(0, "")]
    (rewind,) = events(run, "rewind")
    assert (rewind["step"], len(events(run, "skip"))) == (33, 3)
    assert [step for step in range(1, 41) if step not in map(step_of, checkpoints(run))] == [35], "of no update"
    assert_exponential(run, 0.6)


def ask_during_the_average(run_dir: Path) -> None:
    """The run is asked to stop while the average of its weights is evaluated for the first time."""
    import megallama.train.evaluate

    module: Any = megallama.train.evaluate
    original, calls = module.evaluate, count(1)

    def asked(*given: Any) -> float:
        if next(calls) == 1:
            (run_dir / "STOP").touch()
        loss: float = original(*given)
        return loss

    module.evaluate = asked


def test_a_stop_while_the_average_is_evaluated_leaves_the_trained_weights(
    alone: dict[str, Path], byte_dataset: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    start = words(byte_dataset, run_dir, *EXPONENTIAL, f"evaluation.sets={{same: {byte_dataset}}}")
    assert pretrain(1, start, plant=partial(ask_during_the_average, run_dir))[0][0] == 75
    assert [split for step, split, _ in evaluations(run_dir) if step == 2][-2:] == ["same", "average/validation"]
    assert "ends before the average on same, for the file STOP" in events(run_dir, "notice")[-1]["text"]
    assert pretrain(1, start) == [(0, "")]
    for step in (2, 6):
        ours, theirs = (
            read_tensors(where / "checkpoints" / f"step_{step:08d}") for where in (run_dir, alone["exponential"])
        )
        assert [name for name, tensor in theirs.items() if not torch.equal(ours[name], tensor)] == []


@pytest.mark.parametrize(("ranks", "layout"), [(1, EXPONENTIAL), (2, [*LATEST, "zero.stage=2", "train.dtype=bf16"])])
def test_a_run_that_was_stopped_goes_on_with_its_average_to_the_bit(
    ranks: int, layout: list[str], byte_dataset: str, tmp_path: Path
) -> None:
    for name, stops in (("whole", [4]), ("parts", [2, 4])):
        for stop in stops:
            start = words(byte_dataset, tmp_path / name, f"train.stop_after={stop}", *layout)
            assert pretrain(ranks, start) == [(0, "")] * ranks
    assert_same_tensors(tmp_path / "parts", tmp_path / "whole")
    assert evaluations(tmp_path / "parts") == evaluations(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["exponential", "latest"])
def test_an_average_goes_on_at_another_layout(kind: str, byte_dataset: str, tmp_path: Path) -> None:
    """What is saved by tensor-parallel ranks is read by those of ZeRO 3, and of a pipeline."""
    run_dir, more = tmp_path / "run", EXPONENTIAL if kind == "exponential" else LATEST
    for stop, layout in ((2, LAYOUTS["tp2"]), (4, LAYOUTS["dp2-zero3"]), (6, LAYOUTS["pp2-dualpipev"])):
        start = words(byte_dataset, run_dir, *layout[1], *more, f"train.stop_after={stop}")
        assert pretrain(2, start) == [(0, "")] * 2
    assert events(run_dir, "notice") == []
    if kind == "exponential":
        assert_exponential(run_dir, DECAY)
    else:
        assert_latest(run_dir)


def test_averaging_that_is_switched_on_begins_with_the_weights_and_off_is_left_out(
    alone: dict[str, Path], byte_dataset: str, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"

    def train(steps: int, *more: str) -> Path:
        assert pretrain(1, words(byte_dataset, run_dir, f"train.stop_after={steps}", *more)) == [(0, "")]
        return checkpoints(run_dir)[-1]

    first = train(2, "train.average.kind=none")
    assert not any(map(is_average, read_tensors(first)))
    second = train(3, *EXPONENTIAL)
    kept = 2 / (2 + 9)
    then, now = weights_of(first), weights_of(second)
    assert_close(average_of(second), {name: kept * then[name] + (1 - kept) * now[name] for name in now})
    assert "step_00000002 has no exponential average" in events(run_dir, "notice")[-1]["text"]
    third = train(4, *LATEST)
    assert read_saved(third).average == Averaged("latest", (4, 3, 2))
    assert inspect(third) == []
    last = train(5)
    assert read_saved(last).average is None
    assert inspect(last) == []
    assert losses(run_dir) == losses(alone["latest"])[:5] == losses(alone["exponential"])[:5]


def test_a_damaged_checkpoint_is_left_out_of_the_average(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    assert pretrain(1, words(byte_dataset, run_dir, *LATEST, "train.stop_after=3")) == [(0, "")]
    flip(run_dir / "checkpoints" / "step_00000002" / "rank_00000.bin")
    assert pretrain(1, words(byte_dataset, run_dir, *LATEST, "train.stop_after=4")) == [(0, "")]
    (notice,) = events(run_dir, "notice")
    assert notice["text"] == "step_00000002 is not in the average of the weights: rank_00000.bin is damaged"
    *_, third, fourth = checkpoints(run_dir)
    assert read_saved(fourth).average == Averaged("latest", (4, 3)), "what is older than three saves is not asked for"
    every = [weights_of(path) for path in (third, fourth)]
    assert_close(average_of(fourth), {name: sum(w[name] for w in every) / 2 for name in every[0]})


def test_what_is_evaluated_is_what_is_exported(alone: dict[str, Path], byte_dataset: str, tmp_path: Path) -> None:
    """A run that begins with an export of the average has its loss before the first step, on every set."""
    for kind, run_dir in alone.items():
        found = {(step, split): loss for step, split, loss in evaluations(run_dir)}
        splits = [split for step, split in found if step == 6]
        assert splits == ["train", "validation", "average/validation"]
        assert (0, "average/validation") not in found
        model, after = tmp_path / f"model-{kind}", tmp_path / f"run-{kind}"
        result = CliRunner().invoke(app, ["export", str(run_dir), str(model), "--dtype", "fp32", "--average"])
        assert result.exit_code == 0, result.exception
        assert "| weights | the" in (model / "README.md").read_text()
        start = words(byte_dataset, after, f"checkpoint.init_from={model}", "train.stop_after=1")
        assert pretrain(1, start) == [(0, "")]
        loss = next(loss for step, split, loss in evaluations(after) if (step, split) == (0, "validation"))
        assert loss == pytest.approx(found[6, "average/validation"], rel=1e-6)
        assert loss != pytest.approx(found[6, "validation"], rel=1e-5)
        state = read_saved(checkpoints(run_dir)[-1]).state
        assert state.validation_loss == found[6, "validation"]
        names = {curve.name for curve in read_record(run_dir, "run", 100).curves if curve.plot == "loss"}
        assert names == {"train", "train, evaluated", "validation", "average/validation"}


def test_a_frozen_weight_is_its_own_average(byte_dataset: str, tmp_path: Path) -> None:
    run_dir, out = tmp_path / "run", tmp_path / "out"
    frozen = "model.embed_tokens.weight"
    start = words(byte_dataset, run_dir, *EXPONENTIAL, f"train.freeze=[{frozen}]", "train.stop_after=2")
    assert pretrain(1, start) == [(0, "")]
    last = checkpoints(run_dir)[-1]
    tensors = read_tensors(last)
    assert average_name(frozen) not in tensors
    assert inspect(last) == []
    numbers = [file.bytes for name, file in read_manifest(last).files.items() if NUMBERS.fullmatch(name)]
    assert sum(numbers) == checkpoint_bytes(load_config(start[1], start[2:]))
    assert CliRunner().invoke(app, ["export", str(run_dir), str(out), "--average", "--dtype", "fp32"]).exit_code == 0
    from megallama.formats.folder import open_weights

    exported = open_weights(out)
    assert torch.equal(exported.read(frozen), tensors[frozen])
    assert torch.equal(exported.read("lm_head.weight"), tensors[average_name("lm_head.weight")])


def test_a_checkpoint_whose_average_is_not_whole_is_damaged(alone: dict[str, Path], tmp_path: Path) -> None:
    path = checkpoints(alone["latest"])[-1]
    missing = shutil.copytree(path, tmp_path / "missing" / path.name)
    edit(missing / "tensors.json", lambda content: content["tensors"].pop("average.lm_head.weight"))
    assert inspect(missing) == ["average.lm_head.weight is missing"]
    unsaid = shutil.copytree(path, tmp_path / "unsaid" / path.name)
    edit(unsaid / "state.json", lambda content: content.pop("average"))
    assert "more tensors are not of the model" in inspect(unsaid)[0]
    spoiled = shutil.copytree(path, tmp_path / "spoiled" / path.name)
    places = json.loads((spoiled / "tensors.json").read_text())["tensors"]["average.lm_head.weight"]["chunks"][0]
    with (spoiled / places["file"]).open("r+b") as file:
        file.seek(places["start"])
        byte = file.read(1)[0]
        file.seek(places["start"])
        file.write(bytes([byte ^ 1]))
    assert inspect(spoiled) == [f"{places['file']} is damaged"]


REFUSED = {
    "train.average.decay=1": "train.average.decay=1 is not legal; expected less than 1",
    "train.average.decay=0": "train.average.decay=0 is not legal; expected more than 0",
    "train.average.checkpoints=1": "train.average.checkpoints=1 is not legal; expected at least 2",
    "train.average.decay=0.9": "train.average.decay=0.9 is for train.average.kind=exponential, and that is none; ",
    "train.average.kind=latest train.average.checkpoints=2 checkpoint.every=0": "nearest legal: checkpoint.every=1",
    "train.average.kind=exponentail": "did you mean exponential?",
    "train.average.kind=latest": "checkpoint.keep=2 is less than train.average.checkpoints=5, which "
    "train.average.kind=latest takes the mean of; nearest legal: checkpoint.keep=5, or train.average.checkpoints=2",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_cannot_be_averaged_is_refused(override: str, byte_dataset: str, tmp_path: Path) -> None:
    ((code, said),) = pretrain(1, arguments(byte_dataset, tmp_path / "run", *override.split()))
    assert code == 2
    assert REFUSED[override] in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["export", "generate", "eval", "chat", "serve"])
def test_a_checkpoint_without_an_average_is_refused(command: str, short_run: Path, tmp_path: Path) -> None:
    more = {"export": [str(tmp_path / "out")], "eval": [__file__], "serve": ["--port", "0"]}.get(command, [])
    result = CliRunner().invoke(app, [command, str(short_run), *more, "--average"])
    assert isinstance(result.exception, UserError)
    assert "step_00000040 holds no average of the weights; leave out --average, or train" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_average_is_read_by_whatever_reads_a_checkpoint(alone: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("document 7 is about the number 49. " * 5)
    found = []
    for more in ([], ["--average"]):
        result = CliRunner().invoke(app, ["eval", str(alone["latest"]), str(text), "--json", *more])
        assert result.exit_code == 0, result.exception
        found.append(json.loads(result.stdout)["loss"])
    assert all(map(math.isfinite, found))
    assert found[0] != found[1]
