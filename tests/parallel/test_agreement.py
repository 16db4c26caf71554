"""Ranks that would not run the same: refused together, in one sentence, before anything is written."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from megallama.corpus.building.build import build_dataset
from megallama.data.dataset import SAMPLED_STRETCHES, SAMPLED_TOKENS
from megallama.parallel.agreement import differences
from megallama.parallel.launch import Launch
from megallama.parallel.spawn import run_ranks
from tests.launching import PRETRAIN, ROOT, arguments, events, execute, pretrain, pretrain_here, tree
from tests.test_bad_input import assert_one_sentence, write_ranks
from tests.test_launchers import deepspeed, free_port, torchrun

# What rank 1 is started with, and what the sentence must say of it.
KEYS = {
    "seed": (["train.seed=7"], ["train.seed is 1234 on rank 0 (", "and 7 on rank 1 ("]),
    "rate": (["optimizer.lr=2e-3"], ["optimizer.lr is 0.001 on rank 0 (", "and 0.002 on rank 1 ("]),
    "schedule": (["schedule.kind=constant"], ['schedule.kind is "cosine" on rank 0', '"constant" on rank 1']),
    "batch": (["train.global_batch_size=8"], ["train.global_batch_size is 4 on rank 0", "8 on rank 1"]),
    "length": (["train.steps=9"], ["train.steps is 4 on rank 0", "9 on rank 1"]),
    "groups": (["parallel.tensor=2"], ["parallel.tensor is 1 on rank 0", "2 on rank 1"]),
    "run directory": (["run.dir=elsewhere"], ['elsewhere" on rank 1']),
    "two keys": (["train.max_skipped=3", "watchdog.factor=4"], ["train.max_skipped is 100", "watchdog.factor is 10.0"]),
}


@pytest.mark.parametrize("what", KEYS)
def test_another_value_on_one_rank_is_refused_by_all(what: str, byte_dataset: str, tmp_path: Path) -> None:
    more, words = KEYS[what]
    assert_refused_together(arguments(byte_dataset, tmp_path / "run"), more, words)
    assert list(tmp_path.iterdir()) == []
    assert not Path("elsewhere").exists()


def test_another_rate_on_one_rank_is_refused_where_a_run_goes_on(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", "train.stop_after=2")
    assert pretrain(2, words) == [(0, "")] * 2
    before = tree(tmp_path)
    assert_refused_together([*words, "train.stop_after=4"], ["optimizer.lr=2e-3"], ["optimizer.lr is 0.001 on rank 0"])
    assert tree(tmp_path) == before
    assert pretrain(2, [*words, "train.stop_after=4"]) == [(0, "")] * 2
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [2]


def test_a_copy_of_the_data_may_lie_elsewhere_and_must_be_one(tmp_path: Path) -> None:
    """The copies differ where neither the index nor the first 2^20 ids do."""
    wide = max(1 << 20, SAMPLED_STRETCHES * SAMPLED_TOKENS) + 100_000
    (tmp_path / "text.txt").write_text("some text about numbers\n" * (wide // 24))
    build_dataset([str(tmp_path / "text.txt")], str(tmp_path / "corpus"), "bytes", workers=1)
    (tmp_path / "node").mkdir()
    for path in tmp_path.glob("corpus.*"):
        shutil.copy(path, tmp_path / "node")
    copy = tmp_path / "node" / "corpus"
    words = arguments(str(tmp_path / "corpus"), tmp_path / "run", "train.stop_after=1", "data.validation_fraction=0")
    assert apart(words, [f"data.path={copy}"]) == [(0, "")] * 2

    content = bytearray(copy.with_suffix(".bin").read_bytes())
    content[-100_000:] = b"\x07\x00" * 50_000
    copy.with_suffix(".bin").write_bytes(content)
    assert_refused_together(words, [f"data.path={copy}"], ["the training data is ", "on rank 1 ("])


def test_other_validation_data_on_one_rank_are_refused(byte_dataset: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("held out\n" * 100)
    build_dataset([str(tmp_path / "text.txt")], str(tmp_path / "held"), "bytes", workers=1)
    words = arguments(byte_dataset, tmp_path / "run", f"data.validation_path={byte_dataset}")
    more = [f"data.validation_path={tmp_path / 'held'}"]
    assert_refused_together(words, more, ["the validation data is "])


def test_another_tokenizer_on_one_rank_is_refused(byte_dataset: str, tmp_path: Path) -> None:
    """Of a dataset that does not say what it was made with, as Megatron's do not."""
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{byte_dataset}{suffix}", tmp_path)
    write_ranks(tmp_path / "other.tiktoken", 300)
    words = arguments(str(tmp_path / "corpus"), tmp_path / "run")
    assert_refused_together(words, [f"data.tokenizer={tmp_path / 'other.tiktoken'}"], ["the tokenizer is "])
    assert not (tmp_path / "run").exists()


def test_other_code_on_one_node_is_refused(byte_dataset: str, tmp_path: Path) -> None:
    """Two processes without a launcher, one of which finds another checkout."""
    shutil.copytree(ROOT / "megallama", tmp_path / "other" / "megallama", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "other" / "megallama" / "train" / "lr_schedule.py").open("a") as file:
        file.write("# a line more\n")
    script = (
        f"export WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={free_port()}\n"
        'RANK=0 "$@" & first=$!\n'
        f'RANK=1 PYTHONPATH={tmp_path / "other"} "$@"; second=$?\n'
        "wait $first; echo $? $second"
    )
    command = [sys.executable, PRETRAIN, *arguments(byte_dataset, tmp_path / "run")]
    outcome = execute(["bash", "-c", script, "two", *command], tmp_path)
    assert outcome.out == "2 2\n"
    assert_one_sentence(outcome.err, ["the code of megallama/train/lr_schedule.py is ", "on rank 1 ("])
    assert outcome.err.count(" is ") == 1, "and nothing else differs"


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_a_launcher_s_user_reads_one_sentence(launcher: str, byte_dataset: str, tmp_path: Path) -> None:
    script = tmp_path / "apart.py"
    script.write_text(
        "import os, runpy, sys\n"
        "if os.environ['RANK'] == '1': sys.argv.append('optimizer.lr=2e-3')\n"
        f"runpy.run_path({PRETRAIN!r}, run_name='__main__')\n"
    )
    command = torchrun(2) if launcher == "torchrun" else deepspeed("--num_gpus=2")
    outcome = execute([*command, str(script), *arguments(byte_dataset, tmp_path / "run")], tmp_path)
    assert outcome.code == (1 if launcher == "torchrun" else 2), "torchrun makes 1 of every code"
    (sentence,) = outcome.sentences
    assert "optimizer.lr is 0.001 on rank 0" in sentence
    assert outcome.left_over == []
    assert not (tmp_path / "run").exists()


def test_many_ranks_and_values_make_a_short_sentence() -> None:
    nodes = [f"node{rank // 8}" for rank in range(64)]
    stale: list[dict[str, str]] = [{"optimizer.lr": "0.1" if rank // 8 == 3 else "0.2"} for rank in range(64)]
    said = differences(stale, nodes)
    assert "optimizer.lr is 0.2 on ranks 0-23,32-63 (node0, node1, node2, ...) and 0.1 on ranks 24-31 (node3)" in said
    apart: list[dict[str, str]] = [{f"key{key}": str(rank) for key in range(20)} for rank in range(64)]
    said = differences(apart, nodes)
    assert "key0 is 0 on rank 0 (node0) and 1 on rank 1 (node0) and 2 on rank 2 (node0) and 61 other values" in said
    assert "and 14 more" in said
    assert "key6" not in said
    unknown = differences([{"a": "1"}, {"a": "1", "b": "x" * 500}], ["n", "n"])
    assert "b is missing on rank 0 (n) and xxx" in unknown
    assert len(unknown) < 300


def assert_refused_together(words: list[str], more: list[str], said: list[str]) -> None:
    """Both ranks leave with 2 and the same sentence."""
    first, second = apart(words, more)
    assert first[0] == 2
    assert_one_sentence(first[1], ["the ranks would not run the same", *said])
    assert second == first


def apart(words: list[str], more: list[str]) -> list[tuple[int, str]]:
    """Two ranks of `words`, the second with `more`."""
    return run_ranks(pretrain_apart, 2, words, more, timeout=60.0)


def pretrain_apart(launch: Launch, words: list[str], more: list[str]) -> tuple[int, str]:
    return pretrain_here(launch, [*words, *more] if launch.rank else words, None)
