"""A run whose length is in tokens: it sees them all, once each, whatever becomes of its batch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.format import STATE
from megallama.checkpoint.state import newest_seen
from megallama.cluster.cli import reached
from megallama.cluster.job import main
from megallama.config.load import load_config
from megallama.data.loader import Loader
from megallama.data.source import open_source
from megallama.layout.budget import NOTHING_SEEN, Seen, total_steps
from megallama.train.lr_schedule import next_rate
from tests.checkpoint.damaging import edit
from tests.launching import arguments, events, pretrain

SAMPLES, SEQUENCE = 41, 32
BY_TOKENS = ["train.steps=null", f"train.tokens={SAMPLES * SEQUENCE - 1}", "evaluation.every=0", "checkpoint.every=0"]
PARTS = [
    (1, ["train.global_batch_size=4", "train.stop_after=5"]),  # 20 sequences
    (2, ["train.global_batch_size=8", "train.stop_after=7"]),  # 36
    (1, ["train.global_batch_size=2"]),  # 42
]


def record(folder: str) -> None:
    """Write down the rows of every micro-batch that is trained on, a file for each rank."""
    import megallama.train.loop

    original: Callable[..., Any] = megallama.train.loop.train_step

    def recorded(run: Any, batches: Any, *rest: Any) -> Any:
        with Path(folder, f"rows-{run.mesh.rank}.jsonl").open("a") as file:
            for batch in batches:
                for row in batch.tokens.tolist():
                    file.write(json.dumps(row) + "\n")
        return original(run, batches, *rest)

    megallama.train.loop.train_step = recorded


def rows(folder: Path) -> list[tuple[int, ...]]:
    files = sorted(folder.glob("rows-*.jsonl"))
    return [tuple(json.loads(line)) for file in files for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def changed(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in three parts, each by another batch, what it trained on, and what the last part printed."""
    home = tmp_path_factory.mktemp("changed")
    for number, (world_size, more) in enumerate(PARTS):
        (home / str(number)).mkdir()
        words = arguments(byte_dataset, home / "run", *BY_TOKENS, *more)
        plant = partial(record, str(home / str(number)))
        assert pretrain(world_size, words, plant=plant, log=home / f"log-{number}") == [(0, "")] * world_size
    return home


def config_of(run_dir: Path, dataset: str, *more: str) -> Any:
    words = arguments(dataset, run_dir, *BY_TOKENS, *more)
    return load_config(words[1], words[2:])


def test_every_sequence_is_seen_once_and_the_first_step_that_reaches_the_tokens_is_the_last(
    changed: Path, byte_dataset: str
) -> None:
    config = config_of(changed / "run", byte_dataset)
    straight = Loader(open_source(config.data, "train", config.train.seed, config.model.vocab_size), 1, lambda _: 1)
    expected = [tuple(straight.step(sample)[0].tokens[0].tolist()) for sample in range(42)]
    assert len(set(expected)) == 42
    parts = [rows(changed / str(number)) for number in range(3)]
    assert parts[0] == expected[:20]
    assert sorted(parts[1]) == sorted(expected[20:36]), "two ranks share it"
    assert parts[2] == expected[36:]
    found = events(changed / "run", "train")
    assert [event["samples"] for event in found] == [4, 8, 12, 16, 20, 28, 36, 38, 40, 42]
    assert [event["tokens"] for event in found] == [32 * event["samples"] for event in found]
    last = events(changed / "run")[-1]
    assert (last["event"], last["step"], last["reason"], last["status"]) == ("stop", 10, "done", "done")


def test_each_part_shows_the_steps_that_its_own_batch_leaves(changed: Path) -> None:
    """11 by 4 alone; 5 and 3 by 8, 7 and 3 by 2 after that."""
    found = events(changed / "run", "train")
    assert [event["total_steps"] for event in found] == [11] * 5 + [8] * 2 + [10] * 3
    shown = re.findall(r"^step +(\d+/\d+)  loss .* eta ([\d:]+)$", (changed / "log-2").read_text(), re.MULTILINE)
    assert [count for count, _ in shown] == ["8/10", "9/10", "10/10"]
    assert shown[-1][1] == "0:00:00"


def test_the_rate_goes_on_from_where_it_is_in_the_data_down_to_min_lr(changed: Path, byte_dataset: str) -> None:
    rates = [event["lr"] for event in events(changed / "run", "train")]
    config = config_of(changed / "run", byte_dataset, "train.global_batch_size=4")
    undisturbed = [next_rate(config, Seen(step, 4 * step, 4)) for step in range(11)]
    assert rates[:5] == undisturbed[:5]
    assert rates[5] == pytest.approx(undisturbed[6], rel=0.05), "28 sequences in"
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == config.schedule.min_lr


def test_the_state_says_which_batch_the_run_began_with(changed: Path, byte_dataset: str) -> None:
    assert newest_seen(config_of(changed / "run", byte_dataset)) == Seen(10, 42, 4)


def test_a_run_by_tokens_is_to_the_bit_the_one_of_as_many_steps(byte_dataset: str, tmp_path: Path) -> None:
    by_tokens = ["train.steps=null", f"train.tokens={4 * 4 * SEQUENCE}"]
    for name, more in (("steps", ["train.steps=4"]), ("tokens", by_tokens)):
        assert pretrain(1, arguments(byte_dataset, tmp_path / name, *more)) == [(0, "")]
    kept = ("step", "total_steps", "samples", "loss", "grad_norm", "lr")
    first, second = (
        [[e[key] for key in kept] for e in events(tmp_path / name, "train")] for name in ("steps", "tokens")
    )
    assert first == second


def test_a_run_that_has_seen_more_than_its_tokens_is_done_and_says_so(
    byte_dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also to a job: by steps of its new batch it would have 2 of 6 left."""
    words = arguments(byte_dataset, tmp_path / "run", *BY_TOKENS, "train.stop_after=4")
    assert pretrain(1, words) == [(0, "")]
    less = ["train.tokens=500", "train.stop_after=null", "train.global_batch_size=2"]
    assert pretrain(1, [*words, *less], log=tmp_path / "log") == [(0, "")]
    assert [event["step"] for event in events(tmp_path / "run", "train")] == [1, 2, 3, 4]
    assert (tmp_path / "log").read_text().splitlines()[-1] == "step 4  done"
    outcome = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert (outcome["status"], outcome["step"]) == ("done", 4)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    main(["begin", "--nodes", "1", "--ranks-per-node", "1", words[1], *words[2:], *less])
    found = capsys.readouterr()
    assert (found.out, found.err) == ("", f"{tmp_path}/run has done all 4 steps\n")


def test_a_job_goes_by_the_tokens_that_the_newest_checkpoint_has_seen(
    changed: Path, byte_dataset: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    words = arguments(byte_dataset, changed / "run", *BY_TOKENS)
    begin = ["begin", "--nodes", "1", "--ranks-per-node", "1", words[1], *words[2:]]
    main([*begin, "train.global_batch_size=2"])  # 21 steps for who counts from the beginning
    assert capsys.readouterr().out == ""
    main([*begin, "train.global_batch_size=8", "train.tokens=1400"])  # 6 of them, and 2 sequences are left
    assert capsys.readouterr().out == f"{changed}/run\n"


def test_the_status_of_a_launch_counts_the_steps_from_where_the_run_is(changed: Path, byte_dataset: str) -> None:
    by_8 = ["train.global_batch_size=8", "train.tokens=2K"]
    assert (
        reached(config_of(changed / "run", byte_dataset, *by_8), changed / "run") == "newest checkpoint: step 10 of 13"
    )
    assert total_steps(config_of(changed / "run", byte_dataset, *by_8), NOTHING_SEEN) == 8


def test_a_stop_after_a_changed_batch_is_refused_by_the_steps_there_really_are(
    changed: Path, byte_dataset: str
) -> None:
    words = arguments(byte_dataset, changed / "run", *BY_TOKENS, "train.global_batch_size=8", "train.tokens=2K")
    ((code, said),) = pretrain(1, [*words, "train.stop_after=14"])
    assert code == 2
    assert said.endswith("is more than train.tokens=2000 = 13 steps; nearest legal: train.stop_after=13\n")


def test_a_checkpoint_that_does_not_say_its_first_batch_continues_by_its_mean(
    byte_dataset: str, tmp_path: Path
) -> None:
    words = arguments(byte_dataset, tmp_path / "run", *BY_TOKENS)
    assert pretrain(1, [*words, "train.stop_after=3"]) == [(0, "")]
    edit(tmp_path / "run" / "checkpoints" / "step_00000003" / STATE, lambda tree: tree["state"].pop("first_batch"))
    assert newest_seen(config_of(tmp_path / "run", byte_dataset)) == Seen(3, 12)
    assert pretrain(1, [*words, "train.global_batch_size=8"]) == [(0, "")]
    assert newest_seen(config_of(tmp_path / "run", byte_dataset)) == Seen(7, 44, 4)
    rates = [event["lr"] for event in events(tmp_path / "run", "train")]
    config = config_of(tmp_path / "run", byte_dataset, "train.global_batch_size=8")
    assert rates[3:] == [next_rate(config, Seen(3 + n, 12 + 8 * n, 4)) for n in range(4)]


def test_another_sequence_length_keeps_the_tokens_that_were_seen_and_the_total(
    byte_dataset: str, tmp_path: Path
) -> None:
    """640 tokens are 10 sequences of 64; 896 of 1,311 are 56 of 16, by batches of 16 as many tokens as before."""
    run = tmp_path / "run"
    parts = [
        (1, ["train.global_batch_size=4", "train.stop_after=5"]),
        (2, ["train.micro_batch_size=1", "train.global_batch_size=2", "data.sequence_length=64", "train.stop_after=7"]),
        (1, ["train.global_batch_size=16", "data.sequence_length=16"]),
    ]
    for number, (world_size, more) in enumerate(parts):
        (tmp_path / str(number)).mkdir()
        words = arguments(byte_dataset, run, *BY_TOKENS, *more)
        assert pretrain(world_size, words, plant=partial(record, str(tmp_path / str(number)))) == [(0, "")] * world_size
    found = events(run, "train")
    assert [event["tokens"] for event in found] == [128, 256, 384, 512, 640, 768, 896, 1152, 1408]
    assert [event["total_steps"] for event in found] == [11] * 5 + [11] * 2 + [9] * 2
    for number, length, positions in ((1, 64, range(10, 14)), (2, 16, range(56, 88))):
        config = config_of(run, byte_dataset, f"data.sequence_length={length}")
        straight = Loader(open_source(config.data, "train", config.train.seed, config.model.vocab_size), 1, lambda _: 1)
        expected = [tuple(straight.step(sample)[0].tokens[0].tolist()) for sample in positions]
        assert sorted(rows(tmp_path / str(number))) == sorted(expected)
    said = [event["text"] for event in events(run, "notice")]
    assert said == [
        "data.sequence_length was 32 and is 64: the 640 tokens seen count as 10 sequences of a new order",
        "data.sequence_length was 64 and is 16: the 896 tokens seen count as 56 sequences of a new order",
    ]
    config = config_of(run, byte_dataset, "data.sequence_length=16")
    assert newest_seen(config) == Seen(9, 88, 8), "8 of 16 tokens are 4 of 32"
    rates = [event["lr"] for event in found]
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] == config.schedule.min_lr


def test_a_checkpoint_that_does_not_say_its_sequence_length_continues_at_its_own_alone(
    byte_dataset: str, tmp_path: Path
) -> None:
    words = arguments(byte_dataset, tmp_path / "run", *BY_TOKENS)
    assert pretrain(1, [*words, "train.stop_after=2"]) == [(0, "")]
    edit(tmp_path / "run" / "checkpoints" / "step_00000002" / STATE, lambda tree: tree["data"].pop("sequence_length"))
    ((code, said),) = pretrain(1, [*words, "data.sequence_length=64"])
    assert code == 2
    assert "data.pad or the split, or data.sequence_length) is not that of" in said
    assert pretrain(1, [*words, "train.stop_after=3"]) == [(0, "")]
