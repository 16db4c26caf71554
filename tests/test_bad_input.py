"""What a user can get wrong: exit code 2, one sentence with the value and a fix, nothing written."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megallama.corpus.building.build import build_dataset
from tests.launching import BIN, CONFIG, NO_NETWORK, PRETRAIN, Outcome, arguments, execute, pretrain, tree
from tests.test_launchers import torchrun

MEGALLAMA = str(BIN / "megallama")

# Overrides, number of ranks, and the words that the sentence must hold: the value as typed, and what would do.
KEYS: dict[str, tuple[list[str], int, list[str]]] = {
    "misspelt key": (["train.micro_batchsize=2"], 1, ["train.micro_batchsize", "train.micro_batch_size"]),
    "wrong type": (["train.steps=many"], 1, ["train.steps=many", "chinchilla"]),
    "true for a number": (["train.global_batch_size=true"], 1, ["train.global_batch_size=true", "expected"]),
    "bad number": (["optimizer.lr=3e-4x"], 1, ["optimizer.lr=3e-4x", "number"]),
    "fraction of a step": (["train.steps=2.5"], 1, ["train.steps=2.5", "expected"]),
    "no value": (["train.steps"], 1, ["train.steps", "train.steps=VALUE"]),
    "heads by tp": (["parallel.tensor=3"], 1, ["parallel.tensor=3", "num_attention_heads=4", "legal: 2 or 4"]),
    "world size": (["parallel.tensor=2"], 3, ["world size of 3", "2 * 1 * 1 = 2", "world size 2 or 4"]),
    "global batch": (
        ["train.global_batch_size=7"],
        1,
        ["2 * 1 = 2", "train.micro_batch_size=1 or 7"],
    ),
    "ZeRO 0": (["zero.stage=0"], 1, ["zero.stage=0", "use zero.stage=1"]),
    "ZeRO 4": (["zero.stage=4"], 1, ["zero.stage=4", "3"]),
    "a shape for plans alone": (["model.block=gpt"], 1, ["model.block=gpt", "model.block=llama"]),
    "longer than positions": (["data.sequence_length=65"], 1, ["sequence_length=65", "sequence_length=64"]),
    "longer than the data": (
        ["data.sequence_length=100000", "model.max_position_embeddings=100000"],
        1,
        ["data.sequence_length=100000", "largest legal: "],
    ),
    "small vocabulary": (["model.vocab_size=256"], 1, ["model.vocab_size=256", "model.vocab_size=257"]),
    "nothing to resume": (["checkpoint.resume=must"], 1, ["checkpoint.resume=must", "checkpoint.resume=auto"]),
    "no such weights": (["checkpoint.init_from=nowhere"], 1, ["nowhere"]),
    "another tokenizer": (["data.tokenizer=byte"], 1, ["'byte'", "bytes"]),
    "no run directory": (["run.dir="], 1, ["run.dir="]),
    "a file for a run directory": (["run.dir=README.md"], 1, ["run.dir=README.md", "is not a folder"]),
    "no account": (["logging.wandb={project: x}"], 1, ["logging.wandb.mode=online", "logging.wandb.mode=offline"]),
    "fewer layers than chunks": (
        ["parallel.pipeline=2", "parallel.schedule=dualpipev"],
        2,
        ["num_hidden_layers=2", "2 * 2 = 4 stages", "parallel.pipeline=1"],
    ),
    "stages without a pipeline": (
        ["parallel.layers_per_stage=[1, 1]"],
        1,
        ["parallel.layers_per_stage=[1, 1]", "1 * 1 = 1", "for example [2]"],
    ),
    "more layers than there are": (
        ["parallel.layers_per_stage=[5]"],
        1,
        ["parallel.layers_per_stage=[5]", "num_hidden_layers=2", "for example [2]"],
    ),
    "misspelt split": (
        ["parallel.layers_per_stage=balancd"],
        1,
        ["parallel.layers_per_stage=balancd", "[8, 9, 9, 6]", "did you mean balanced?"],
    ),
    "too few micro-batches": (
        ["parallel.pipeline=2", "parallel.schedule=dualpipev", "model.num_hidden_layers=4"],
        2,
        ["= 2 micro-batches", "dualpipev", "train.micro_batch_size=1"],
    ),
    "too few micro-batches of ZBV": (
        ["parallel.pipeline=2", "parallel.schedule=zbvzerobubble", "model.num_hidden_layers=4"],
        2,
        ["= 2 micro-batches", "zbvzerobubble", "train.micro_batch_size=1"],
    ),
    "ZeRO 2 in a pipeline": (["parallel.pipeline=2", "zero.stage=2"], 2, ["zero.stage=2", "use zero.stage=1"]),
    "ZeRO 3 in a pipeline": (["parallel.pipeline=2", "zero.stage=3"], 2, ["zero.stage=3", "use zero.stage=1"]),
    "one weight on two ranks": (
        ["parallel.pipeline=2", "model.tie_word_embeddings=true"],
        2,
        ["tie_word_embeddings=true", "1f1b", "use parallel.schedule=zbvzerobubble"],
    ),
    "unknown schedule": (["parallel.schedule=zbv"], 1, ["parallel.schedule=zbv", "zbvzerobubble"]),
    "stop after the end": (["train.stop_after=5"], 1, ["train.stop_after=5", "train.stop_after=4"]),
    "no CUDA": (["train.device=cuda"], 1, ["train.device=cuda", "train.device=cpu"]),
}

# What is done to a copy of the dataset, and what the sentence must hold.
DATA: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing": (lambda bin_file: bin_file.unlink(), ["corpus.bin does not exist", "megallama data build"]),
    "empty": (lambda bin_file: bin_file.write_bytes(b""), ["corpus.bin is empty", "build the dataset again"]),
    "truncated": (lambda bin_file: cut(bin_file, 100), ["corpus.bin has 100 bytes", "cut short"]),
    "index missing": (lambda bin_file: bin_file.with_suffix(".idx").unlink(), ["corpus.idx does not exist", "build"]),
    "index truncated": (lambda bin_file: cut(bin_file.with_suffix(".idx"), 100), ["corpus.idx is cut short", "100"]),
    "index is text": (lambda bin_file: bin_file.with_suffix(".idx").write_text("hello"), ["corpus.idx", "hello"]),
    "sidecar damaged": (lambda bin_file: bin_file.with_suffix(".json").write_text("{"), ["corpus.json", "again"]),
}


@pytest.mark.parametrize("mistake", KEYS)
def test_a_wrong_value_is_refused(mistake: str, byte_dataset: str, tmp_path: Path) -> None:
    overrides, world_size, words = KEYS[mistake]
    assert_refused_by_all(world_size, arguments(byte_dataset, tmp_path / "run", *overrides), words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", DATA)
def test_damaged_data_is_refused(damage: str, byte_dataset: str, tmp_path: Path) -> None:
    for path in Path(byte_dataset).parent.glob("corpus.*"):
        shutil.copy(path, tmp_path)
    damages, words = DATA[damage]
    damages(tmp_path / "corpus.bin")
    before = tree(tmp_path)
    world_size = 2 if damage == "truncated" else 1
    assert_refused_by_all(world_size, arguments(str(tmp_path / "corpus"), tmp_path / "run"), words)
    assert tree(tmp_path) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["model.hidden_size=64"], ["model.hidden_size=64", "model.hidden_size=32", "or another run.dir"]),
        (["model.num_hidden_layers=3"], ["model.num_hidden_layers=3", "model.num_hidden_layers=2"]),
        (["model.rope_theta=500"], ["model.rope_theta=500", "model.rope_theta=10000"]),
        (
            ["model.rope_scaling={rope_type: linear, factor: 2}"],
            ["model.rope_scaling={", "differs from null", "use model.rope_scaling=null"],
        ),
    ],
    ids=["width", "depth", "rotary base", "rotary scaling"],
)
def test_a_checkpoint_of_another_model_is_refused(
    overrides: list[str], words: list[str], byte_dataset: str, short_run: Path
) -> None:
    before = tree(short_run)
    assert_refused_by_all(1, arguments(byte_dataset, short_run, "train.steps=50", *overrides), words)
    assert tree(short_run) == before


def test_weights_of_another_model_are_refused(byte_dataset: str, short_run: Path, tmp_path: Path) -> None:
    weights = short_run / "checkpoints" / "step_00000040"
    more = [f"checkpoint.init_from={weights}", "model.hidden_size=64"]
    words = [str(weights), "model.hidden_size=64", "use model.hidden_size=32, or another checkpoint.init_from"]
    assert_refused_by_all(1, arguments(byte_dataset, tmp_path / "run", *more), words)
    assert list(tmp_path.iterdir()) == []


def test_saying_what_null_stands_for_is_the_same_model(byte_dataset: str, short_run: Path, tmp_path: Path) -> None:
    shutil.copytree(short_run, tmp_path / "run")
    more = ["train.steps=40", "checkpoint.resume=must", "model.num_key_value_heads=2", "model.head_dim=8"]
    assert pretrain(1, arguments(byte_dataset, tmp_path / "run", *more)) == [(0, "")]


def test_a_mistake_that_only_the_second_rank_can_see_is_told(byte_dataset: str, tmp_path: Path) -> None:
    """As where a node misses the data."""
    script = tmp_path / "elsewhere.py"
    script.write_text(
        "import os, runpy, sys, time\n"
        "import megallama.parallel.join\n"  # and torch: seconds that do not count
        "if os.environ['RANK'] == '1':\n"
        "    print('came at', time.time(), file=sys.stderr)\n"
        "    sys.argv.append('data.path=nowhere')\n"
        f"runpy.run_path({PRETRAIN!r}, run_name='__main__')\n"
    )
    words = arguments(byte_dataset, tmp_path / "run")
    outcome = execute([*torchrun(2), str(script), *words], tmp_path)
    assert outcome.code != 0
    (sentence,) = outcome.sentences
    assert sentence.startswith("megallama: rank 1: nowhere.idx does not exist")
    late = "rank 0, which waits for it and holds signals, is not killed by torchrun, 30 s after it noticed"
    assert outcome.seconds_since("came at") < 30, late


def test_overrides_may_stand_on_both_sides_of_the_configuration(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run")
    assert pretrain(1, ["train.stop_after=3", *words, "train.stop_after=1"]) == [(0, "")]


def test_an_unknown_key_on_the_command_line(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", "optimiser.lr=1e-3")
    assert_refused(execute([sys.executable, PRETRAIN, *words], tmp_path), ["optimiser.lr", "optimizer.lr"])
    assert not (tmp_path / "run").exists()


def test_a_configuration_that_is_not_there(tmp_path: Path) -> None:
    outcome = execute([sys.executable, PRETRAIN, "--config", "configs/debog.yaml"], tmp_path)
    assert_refused(outcome, ["configs/debog.yaml", "configs/debug.yaml"])


def test_a_world_size_under_torchrun_is_refused_by_one_voice(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", "parallel.tensor=4")
    outcome = execute([*torchrun(2), PRETRAIN, *words], tmp_path)
    assert outcome.code == 1, "torchrun makes 1 of every code"
    (sentence,) = outcome.sentences
    assert "a world size of 2 is not a multiple of" in sentence
    assert "nearest legal: world size 4, or parallel.tensor=2" in sentence
    assert "megallama/" not in outcome.err, "no traceback of ours"
    assert outcome.left_over == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("made_with", ["bytes", "r50k_base"])
def test_a_named_encoding_without_network(made_with: str, byte_dataset: str, tmp_path: Path) -> None:
    """Also for a dataset that says it was made with it, on a machine that had a network."""
    for path in Path(byte_dataset).parent.glob("corpus.*"):
        shutil.copy(path, tmp_path)
    info = json.loads((tmp_path / "corpus.json").read_text()) | {"tokenizer": made_with}
    (tmp_path / "corpus.json").write_text(json.dumps(info))
    words = arguments(str(tmp_path / "corpus"), tmp_path / "run", "data.tokenizer=r50k_base")
    command = [sys.executable, PRETRAIN, *words]
    outcome = execute(command, tmp_path, TIKTOKEN_CACHE_DIR=str(tmp_path / "empty"), **NO_NETWORK)
    assert_refused(outcome, ["'r50k_base'", "offline use tokenizer bytes", "tokenizer train", "TIKTOKEN_CACHE_DIR"])
    assert not (tmp_path / "run").exists()


def test_generate_from_a_folder_that_is_no_run(tmp_path: Path) -> None:
    assert_refused(
        execute([MEGALLAMA, "generate", str(tmp_path)], tmp_path),
        [f"{tmp_path} holds no checkpoint", "give a run directory"],
    )


def test_verify_at_a_layout_that_is_none(tmp_path: Path) -> None:
    outcome = execute([MEGALLAMA, "verify", CONFIG, "--layouts=tp2,dp2-zerro3"], tmp_path)
    assert_refused(outcome, ["'zerro3'", "dp2-zerro3", "zeroN"])


def test_a_dataset_without_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    words = ["data", "build", str(tmp_path / "empty.txt"), "--output", str(tmp_path / "corpus")]
    assert_refused(execute([MEGALLAMA, *words], tmp_path), ["empty.txt", "no text"])
    assert not list(tmp_path.glob("corpus.*"))


def test_tokens_of_another_encoding_are_refused(tmp_path: Path, byte_dataset: str) -> None:
    """A rank file of 300 ids made the dataset; the run says bytes."""
    ranks = tmp_path / "made.tiktoken"
    write_ranks(ranks, 300)
    (tmp_path / "text.txt").write_text("some text about numbers\n" * 200)
    build_dataset([str(tmp_path / "text.txt")], str(tmp_path / "corpus"), str(ranks), workers=1)
    words = arguments(str(tmp_path / "corpus"), tmp_path / "run", "data.validation_fraction=0", "model.vocab_size=301")
    assert_refused_by_all(1, words, ["data.tokenizer=bytes", f"data.tokenizer={ranks}"])
    assert not (tmp_path / "run").exists()


def assert_refused(outcome: Outcome, words: list[str]) -> None:
    assert (outcome.code, outcome.out) == (2, ""), outcome.err
    assert_one_sentence(outcome.err, words)


def assert_refused_by_all(world_size: int, command: list[str], words: list[str]) -> None:
    """Every rank leaves with 2 for the same reason."""
    first, *others = pretrain(world_size, command)
    assert first[0] == 2
    assert_one_sentence(first[1], words)
    assert others == [first] * (world_size - 1)


def assert_one_sentence(stderr: str, words: list[str]) -> None:
    (line,) = stderr.splitlines()
    assert line.startswith("megallama: ")
    assert [word for word in words if word not in line] == [], line


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def write_ranks(path: Path, count: int) -> None:
    """A tiktoken rank file: the single bytes, and pairs of letters."""
    from megallama.text.rank_file import rank_lines

    pairs = (bytes([a, b]) for a in range(97, 123) for b in range(97, 123))
    tokens = [bytes([byte]) for byte in range(256)] + [next(pairs) for _ in range(count - 256)]
    path.write_bytes(rank_lines({token: rank for rank, token in enumerate(tokens)}))
