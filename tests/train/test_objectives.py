"""Masked language modelling as a run: it sees both sides, learns, resumes to the bit, and is taken for what it is."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from megallama.checkpoint.format import STATE, complete_checkpoints
from megallama.checkpoint.reading.store import load_weights
from megallama.checkpoint.state import read_saved
from megallama.config.load import load_config
from megallama.config.schema import IGNORE_INDEX
from megallama.corpus.building.build import build_dataset
from megallama.corpus.train_tokenizer import train_tokenizer
from megallama.data.indexed import IndexedWriter, token_dtype
from megallama.data.loader import open_data
from megallama.errors import UserError
from megallama.generation.load import load_model
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.spawn import run_ranks
from megallama.train.start import start
from tests.checkpoint.damaging import edit
from tests.launching import arguments, events, pretrain, tree

MASKED = ["train.objective=masked", "model.vocab_size=258"]


@pytest.fixture(scope="module")
def masked(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, undisturbed; tests only read it."""
    run_dir = tmp_path_factory.mktemp("masked") / "run"
    assert pretrain(1, arguments(byte_dataset, run_dir, *MASKED)) == [(0, "")]
    return run_dir


def newest(run_dir: Path) -> Path:
    return complete_checkpoints(run_dir / "checkpoints")[0]


def reached_by_a_change(launch: Launch, words: list[str], place: int) -> list[int]:
    """The positions whose logits change with the token at `place`, for the model that a run of `words` trains."""
    model = start(load_config(words[1], words[2:]), launch).model
    tokens = torch.arange(32)[None]
    changed = tokens.index_fill(1, torch.tensor([place]), 99)
    with torch.no_grad():
        differs = (model(tokens) != model(changed)).any(dim=-1)[0]
    return differs.nonzero().flatten().tolist()


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_later_token_is_seen_by_earlier_ones_of_a_masked_model_alone(
    objective: str, byte_dataset: str, tmp_path: Path
) -> None:
    more = ["model.vocab_size=258", f"train.objective={objective}", "train.stop_after=1", "evaluation.every=0"]
    words = arguments(byte_dataset, tmp_path / "run", *more)
    (reached,) = run_ranks(reached_by_a_change, 1, words, 20)
    assert reached == list(range(20 if objective == "causal" else 0, 32))


def test_a_masked_run_goes_on_as_if_it_had_not_stopped(masked: Path, byte_dataset: str, tmp_path: Path) -> None:
    for more in (["train.stop_after=2"], []):
        assert pretrain(1, arguments(byte_dataset, tmp_path / "parts", *MASKED, *more)) == [(0, "")]
    for kind, keys in (("train", ("step", "loss", "grad_norm", "lr")), ("eval", ("step", "split", "loss"))):
        parts, whole = ([[e[key] for key in keys] for e in events(run, kind)] for run in (tmp_path / "parts", masked))
        assert parts == whole
    mine, theirs = load_weights(newest(tmp_path / "parts")), load_weights(newest(masked))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_all_of_the_square_counts_as_computed(masked: Path, byte_dataset: str, tmp_path: Path) -> None:
    assert all(event["mfu"] == event["mfu_causal"] for event in events(masked, "train"))
    assert pretrain(1, arguments(byte_dataset, tmp_path / "causal", "train.stop_after=1")) == [(0, "")]
    assert all(event["mfu"] > event["mfu_causal"] for event in events(tmp_path / "causal", "train"))


def test_a_run_keeps_its_objective_and_its_weights_may_begin_one_of_another(
    masked: Path, byte_dataset: str, tmp_path: Path
) -> None:
    run_dir, causal = tmp_path / "run", ["model.vocab_size=258", "train.stop_after=1"]
    shutil.copytree(masked, run_dir)
    before = (run_dir / "metrics.jsonl").read_bytes()
    assert pretrain(1, arguments(byte_dataset, run_dir, *causal)) == [
        (
            2,
            f"megallama: train.objective=causal differs from masked in the checkpoint {newest(run_dir)}; use "
            f"train.objective=masked, or another run.dir with checkpoint.init_from={newest(run_dir)}\n",
        )
    ]
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    other = arguments(byte_dataset, tmp_path / "other", *causal, f"checkpoint.init_from={newest(masked)}")
    assert pretrain(1, other) == [(0, "")]
    assert read_saved(newest(tmp_path / "other")).objective == "causal"


def test_a_checkpoint_that_does_not_say_is_causal(short_run: Path, tmp_path: Path) -> None:
    path = shutil.copytree(newest(short_run), tmp_path / newest(short_run).name)
    edit(path / STATE, lambda tree: tree.pop("objective"))
    assert "objective" not in json.loads((path / STATE).read_text())
    assert read_saved(path).objective == "causal"


def test_a_masked_model_continues_no_text(masked: Path) -> None:
    with pytest.raises(UserError, match=r"train\.objective=masked: it fills in masked tokens and continues no text"):
        load_model(masked)


def sources(folder: Path) -> Iterator[str]:
    """60 modules of Python's own library."""
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:60]:
        shutil.copy(path, folder / f"{path.stem}.txt")
        yield str(folder / f"{path.stem}.txt")


@pytest.mark.layouts  # 20 seconds alone
def test_a_masked_model_learns_from_what_stands_around(tmp_path: Path) -> None:
    """Validation loss falls below what a token's frequency tells, and the token that is seen, if it is no mask.

    Half of the tokens that are seen at chosen places are right: -ln(1/2 + q/2) where they are and -ln(q/2) where not.
    """
    build_dataset(list(sources(tmp_path)), str(tmp_path / "data"), "bytes", workers=1)
    sizes = ["data.sequence_length=64", "model.hidden_size=64", "model.intermediate_size=128"]
    batch = ["train.micro_batch_size=16", "train.global_batch_size=16", "evaluation.samples=64"]
    rate = ["train.steps=600", "optimizer.lr=5e-3", "schedule.warmup_steps=40", "evaluation.every=0"]
    words = arguments(str(tmp_path / "data"), tmp_path / "run", *MASKED, *sizes, *batch, *rate)
    assert pretrain(1, words) == [(0, "")]
    validation = open_data(load_config(words[1], words[2:]), Topology(), 0).validation
    assert validation is not None
    labels = np.concatenate([batch.labels.numpy().ravel() for batch in validation.evaluation(64)])
    counts = np.unique(labels[labels != IGNORE_INDEX], return_counts=True)[1]
    q = counts / counts.sum()
    unigram = -float(q @ np.log(q))
    seen = -float(q @ (np.log(0.5 + q / 2) + np.log(q / 2))) / 2
    (first, last) = (event["loss"] for event in events(tmp_path / "run", "eval") if event["split"] == "validation")
    assert last < 0.8 * unigram + 0.2 * seen < unigram < first


def test_another_mask_token_is_another_position(byte_dataset: str, tmp_path: Path) -> None:
    """Data made elsewhere do not say their tokenizer: one that is larger moves the mask token."""
    prefix = str(tmp_path / "foreign")
    for suffix in (".bin", ".idx"):
        shutil.copy(byte_dataset + suffix, prefix + suffix)
    (tmp_path / "text.txt").write_text("some text, and more text\n" * 99)
    train_tokenizer([str(tmp_path / "text.txt")], str(tmp_path / "larger"), 259)
    words = arguments(prefix, tmp_path / "run", "train.objective=masked", "model.vocab_size=300", "train.stop_after=1")
    assert pretrain(1, words) == [(0, "")]
    ((code, said),) = pretrain(1, [*words, f"data.tokenizer={tmp_path}/larger", "train.stop_after=2"])
    assert code == 2
    assert "is not that of the checkpoint" in said


def test_ids_beyond_the_tokenizer_are_refused_before_anything_is_written(byte_dataset: str, tmp_path: Path) -> None:
    """Data made elsewhere: their 257 would be taken for the mask token."""
    writer = IndexedWriter(str(tmp_path / "foreign"), token_dtype(258))
    writer.add(np.arange(258, dtype=token_dtype(258)).repeat(9), np.full(9, 258, "<i4"))
    writer.close()
    before = tree(tmp_path)
    for data in ([f"data.path={tmp_path / 'foreign'}"], [f"evaluation.sets.web={tmp_path / 'foreign'}"]):
        ((code, said),) = pretrain(1, arguments(byte_dataset, tmp_path / "run", *MASKED, *data))
        assert (code, tree(tmp_path)) == (2, before)
        assert said.startswith(
            f"megallama: the data of {tmp_path / 'foreign'} hold the id 257, and data.tokenizer has "
        )
