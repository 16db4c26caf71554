"""Named validation sets: each is evaluated as the validation split is, at every layout, and unfit ones are refused."""

from __future__ import annotations

import json
import math
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megallama.checkpoint.format import complete_checkpoints
from megallama.checkpoint.health import is_healthy
from megallama.checkpoint.state import read_saved
from megallama.config.load import load_config
from megallama.config.schema import IGNORE_INDEX
from megallama.corpus.building.build import build_dataset
from megallama.data.indexed import IndexedWriter, token_dtype
from megallama.data.loader import open_data
from megallama.layout.topology import Topology
from tests.launching import CONFIG, arguments, events, losses, pretrain, tree
from tests.parallel.test_agreement import apart, assert_refused_together
from tests.test_bad_input import assert_refused_by_all

TEXTS = {
    "web": [f"page {number} of the web says {number % 7} things. " * 2 for number in range(20)],
    "code": [f"def f{number}(x):\n    return x + {number}\n" for number in range(3)],
}
MASKED = ["train.objective=masked", "model.vocab_size=258"]
FOUR = ["parallel.tensor=2", "parallel.pipeline=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The datasets `web` and `code`, the latter of fewer samples than an evaluation takes; tests only read it."""
    folder = tmp_path_factory.mktemp("sets")
    for name, texts in TEXTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        build_dataset([str(folder / f"{name}.jsonl")], str(folder / name), "bytes", workers=1)
    return folder


def words(dataset: str, run_dir: Path, folder: Path, *more: str) -> list[str]:
    """A run that is validated on `code`, and evaluated on both sets besides."""
    sets = [f"evaluation.sets.{name}={folder / name}" for name in TEXTS]
    return arguments(dataset, run_dir, f"data.validation_path={folder / 'code'}", *sets, *more)


def evaluated(run_dir: Path, split: str) -> list[float]:
    return [event["loss"] for event in events(run_dir, "eval") if event["split"] == split]


@pytest.fixture(scope="module")
def run_dir(folder: Path, byte_dataset: str) -> Path:
    """Four steps, undisturbed; tests only read it."""
    assert pretrain(1, words(byte_dataset, folder / "run", folder)) == [(0, "")]
    return folder / "run"


def test_each_set_is_evaluated_as_if_it_were_the_validation_data(
    run_dir: Path, folder: Path, byte_dataset: str, tmp_path: Path
) -> None:
    splits = ("train", "validation", "code", "web")
    assert [(e["step"], e["split"]) for e in events(run_dir, "eval")] == [(s, p) for s in (0, 2, 4) for p in splits]
    assert evaluated(run_dir, "code") == evaluated(run_dir, "validation") != evaluated(run_dir, "web")
    web = arguments(byte_dataset, tmp_path / "web", f"data.validation_path={folder / 'web'}")
    assert pretrain(1, web) == [(0, "")]
    assert losses(tmp_path / "web") == losses(run_dir)
    assert evaluated(run_dir, "web") == evaluated(tmp_path / "web", "validation")
    newest = complete_checkpoints(run_dir / "checkpoints")[0]
    assert read_saved(newest).state.validation_loss == evaluated(run_dir, "validation")[-1]


@pytest.mark.parametrize("objective", [[], MASKED], ids=["causal", "masked"])
def test_four_ranks_evaluate_as_one(objective: list[str], folder: Path, byte_dataset: str, tmp_path: Path) -> None:
    for ranks, layout in ((1, []), (4, FOUR)):
        run = words(byte_dataset, tmp_path / str(ranks), folder, *layout, *objective)
        assert pretrain(ranks, run) == [(0, "")] * ranks
    assert evaluated(tmp_path / "1", "code") == evaluated(tmp_path / "1", "validation")
    for name in TEXTS:
        assert evaluated(tmp_path / "4", name) == pytest.approx(evaluated(tmp_path / "1", name), rel=1e-5)


@pytest.mark.parametrize("objective", [[], MASKED], ids=["causal", "masked"])
def test_ranks_share_the_samples_of_a_set(
    objective: list[str], folder: Path, byte_dataset: str, tmp_path: Path
) -> None:
    """Each comes once over all of them, also where micro-batches do not divide the samples."""

    def labels(size: int, dp: int, samples: int) -> list[list[list[int]]]:
        batches = [f"train.micro_batch_size={size}", "train.global_batch_size=24"]
        config = load_config(CONFIG, words(byte_dataset, tmp_path / "run", folder, *objective, *batches)[2:])
        ranks = [open_data(config, Topology(dp=dp), rank).sets["web"].evaluation(samples) for rank in range(dp)]
        every = [[row for batch in rank for row in batch.labels.tolist()] for rank in ranks]
        return [[row for row in rank if set(row) != {IGNORE_INDEX}] for rank in every]

    for samples in (1, 7, 10):
        (one,) = labels(1, 1, samples)
        assert len(one) == samples
        assert labels(3, 1, samples) == [one]
        for size in (1, 2, 3):
            first, second = labels(size, 2, samples)
            assert sorted(first + second) == sorted(one)
            assert abs(len(first) - len(second)) <= size


def test_sets_may_come_and_go_when_a_run_goes_on(
    run_dir: Path, folder: Path, byte_dataset: str, tmp_path: Path
) -> None:
    run = words(byte_dataset, tmp_path / "run", folder)
    assert pretrain(1, [*run, "train.stop_after=2"]) == [(0, "")]
    assert pretrain(1, [*run, f"evaluation.sets={{other: {folder / 'code'}}}"]) == [(0, "")]
    assert losses(tmp_path / "run") == losses(run_dir)
    assert evaluated(tmp_path / "run", "web") == evaluated(run_dir, "web")[:2]
    assert evaluated(tmp_path / "run", "other") == evaluated(run_dir, "code")[2:]


def spoil(prefix: str) -> None:
    """The loss on the dataset is not finite."""
    import megallama.train.loop

    loop: Any = megallama.train.loop
    original = loop.evaluate

    def spoiled(engine: Any, loader: Any, *rest: Any) -> float:
        loss: float = original(engine, loader, *rest)
        return math.nan if loader.source.split.dataset.prefix == prefix else loss

    loop.evaluate = spoiled


def test_a_set_whose_loss_is_not_finite_makes_the_checkpoint_unhealthy(
    folder: Path, run_dir: Path, byte_dataset: str, tmp_path: Path
) -> None:
    run = words(byte_dataset, tmp_path / "run", folder)
    assert pretrain(1, run, plant=partial(spoil, str(folder / "web"))) == [(0, "")]
    for run_of, healthy in ((tmp_path / "run", False), (run_dir, True)):
        (path,) = complete_checkpoints(run_of / "checkpoints")
        assert is_healthy(path) is healthy


def ask_during(call: int, run_dir: Path) -> None:
    """The run is asked to stop while that evaluation of a split or set is going on, counted from 1."""
    import megallama.train.loop

    loop: Any = megallama.train.loop
    original, calls = loop.evaluate, count(1)

    def asked(*given: Any) -> float:
        if next(calls) == call:
            (run_dir / "STOP").touch()
        loss: float = original(*given)
        return loss

    loop.evaluate = asked


@pytest.mark.parametrize(("call", "done"), [(5, 1), (7, 3)], ids=["before validation", "behind it"])
def test_a_stop_waits_for_one_set_and_not_for_all(
    call: int, done: int, run_dir: Path, folder: Path, byte_dataset: str, tmp_path: Path
) -> None:
    """The next start evaluates where the loss on the validation split is still missing."""
    run, splits = words(byte_dataset, tmp_path / "run", folder, "checkpoint.every=0"), ["train", "validation", "code"]
    stopped = pretrain(2, [*run, "zero.stage=1"], plant=partial(ask_during, call, tmp_path / "run"))
    assert [code for code, _ in stopped] == [75, 75]
    (path,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    saved = read_saved(path).state
    assert saved.step == 2
    assert (saved.validation_loss is None) is (done == 1)
    assert [e["split"] for e in events(tmp_path / "run", "eval") if e["step"] == 2] == splits[:done]
    assert not (tmp_path / "run" / "STOP").exists()
    assert pretrain(1, run) == [(0, "")]
    assert losses(tmp_path / "run") == pytest.approx(losses(run_dir), rel=1e-5)
    again = [*splits, "web"] if done == 1 else []
    assert [e["split"] for e in events(tmp_path / "run", "eval") if e["step"] == 2] == splits[:done] + again


def build(text: str, folder: Path) -> None:
    (folder / "text.txt").write_text(text)
    build_dataset([str(folder / "text.txt")], str(folder / "bad"), "bytes", workers=1)


def of_another_tokenizer(folder: Path) -> None:
    build("long enough " * 9, folder)
    info = json.loads((folder / "bad.json").read_text())
    (folder / "bad.json").write_text(json.dumps(info | {"fingerprint": "0" * 64}))


def of_more_ids(folder: Path) -> None:
    writer = IndexedWriter(str(folder / "bad"), token_dtype(1000))
    writer.add(np.arange(900, dtype=token_dtype(1000)), np.array([900], "<i4"))
    writer.close()


REFUSED = {
    "missing": (lambda folder: None, "bad.idx does not exist"),
    "short": (partial(build, "too short"), "data.sequence_length=32 is longer than the data: the validation split of "),
    "another tokenizer": (of_another_tokenizer, "data.tokenizer=bytes is not the tokenizer of the dataset "),
    "more ids": (of_more_ids, "model.vocab_size=257 does not cover the id 899 of the dataset "),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unfit_data_are_refused_before_anything_is_written(what: str, byte_dataset: str, tmp_path: Path) -> None:
    make, sentence = REFUSED[what]
    make(tmp_path)
    before = tree(tmp_path)
    run = arguments(byte_dataset, tmp_path / "run", f"evaluation.sets.web-1={tmp_path / 'bad'}")
    assert_refused_by_all(1, run, ["megallama: evaluation.sets.web-1: ", sentence])
    assert tree(tmp_path) == before


def test_ranks_have_the_same_sets_each_wherever_it_lies(
    run_dir: Path, folder: Path, byte_dataset: str, tmp_path: Path
) -> None:
    """The second rank names another copy, and names them in another order."""
    for path in folder.glob("code.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    swapped = f"evaluation.sets={{code: {tmp_path / 'code'}, web: {folder / 'web'}}}"
    run = words(byte_dataset, tmp_path / "run", folder, "train.stop_after=2")
    assert [*load_config(run[1], run[2:]).evaluation.sets] == ["web", "code"]
    assert apart(run, [swapped]) == [(0, "")] * 2
    for name in TEXTS:
        assert evaluated(tmp_path / "run", name) == pytest.approx(evaluated(run_dir, name)[:2], rel=1e-5)
    other = tmp_path / "other"
    run = words(byte_dataset, other, folder)
    assert_refused_together(run, [f"evaluation.sets.code={folder / 'web'}"], ["the data of evaluation.sets.code is "])
    missing = [f"evaluation.sets={{web: {folder / 'web'}}}"]
    assert_refused_together(run, missing, ["the data of evaluation.sets.code is ", "and missing on rank 1"])
    assert not other.exists()
