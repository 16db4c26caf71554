"""A run from its start to its end: what it records, how it goes on, what it must leave alone."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megallama.checkpoint.format import complete_checkpoints
from megallama.checkpoint.tensors import EXP_AVG, is_weight, moment_name
from megallama.config.load import load_config
from megallama.parallel.launch import Launch
from megallama.parallel.spawn import RankFailedError, run_ranks
from megallama.text.tokenizer import load_tokenizer
from megallama.train.lr_schedule import learning_rate
from megallama.verify.compare import read_tensors
from tests.launching import (
    arguments,
    events,
    losses,
    needs_compiler,
    pretrain,
    pretrain_here,
)

TRAIN_FIELDS = {
    *("event", "step", "tokens", "samples", "loss", "grad_norm", "lr"),
    *("seconds", "tokens_per_second", "mfu", "peak_memory_bytes"),
}


@pytest.fixture(scope="module")
def straight(byte_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of four steps in `run` and what it printed in `log`."""
    folder = tmp_path_factory.mktemp("straight")
    assert pretrain(1, arguments(byte_dataset, folder / "run"), log=folder / "log") == [(0, "")]
    return folder


def test_train_events_count_steps_samples_and_tokens(straight: Path) -> None:
    found = events(straight / "run", "train")
    assert [event["step"] for event in found] == [1, 2, 3, 4]
    for event in found:
        assert event.keys() >= TRAIN_FIELDS
        assert event["samples"] == 4 * event["step"]
        assert event["tokens"] == 32 * event["samples"]
        assert event["tokens_per_second"] == pytest.approx(4 * 32 / event["seconds"])
        assert 0 < event["mfu"] < 1
        assert event["peak_memory_bytes"] > 2**20
    assert 0.9 * math.log(257) < found[0]["loss"] < 1.1 * math.log(257), "an untrained model knows nothing"
    assert found[-1]["loss"] < found[0]["loss"]


def test_eval_events_hold_both_splits_and_the_perplexity_of_their_loss(straight: Path) -> None:
    found = events(straight / "run", "eval")
    assert [(e["step"], e["split"]) for e in found] == [(s, p) for s in (0, 2, 4) for p in ("train", "validation")]
    for event in found:
        assert event["perplexity"] == math.exp(event["loss"])


def test_the_rate_of_each_step_is_that_of_the_schedule(straight: Path) -> None:
    config = load_config(straight / "run" / "config.yaml")
    expected = [learning_rate(step + 1, 4, config.optimizer.lr, config.schedule) for step in range(4)]
    assert [event["lr"] for event in events(straight / "run", "train")] == expected
    assert expected[-1] == config.schedule.min_lr < expected[1] == config.optimizer.lr


def test_the_run_directory_says_what_ran(straight: Path, byte_dataset: str) -> None:
    run_dir = straight / "run"
    words = arguments(byte_dataset, run_dir)
    assert load_config(run_dir / "config.yaml") == load_config(words[1], words[2:])
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["torch"] == version("torch")
    assert environment["topology"] == {"pp": 1, "dp": 1, "cp": 1, "tp": 1}
    tokenizer = load_tokenizer(str(run_dir / "tokenizer"))
    assert tokenizer.fingerprint == load_tokenizer("bytes").fingerprint
    assert tokenizer.decode(tokenizer.encode("naïve 🙂")) == "naïve 🙂"
    newest, *older = complete_checkpoints(run_dir / "checkpoints")
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == newest.name == "step_00000004"
    assert older == []


def test_the_newest_checkpoints_are_kept(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", "checkpoint.every=1", "checkpoint.keep=2")
    pretrain(1, words)
    assert [p.name for p in complete_checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step_00000004",
        "step_00000003",
    ]
    assert [event["step"] for event in events(tmp_path / "run", "checkpoint")] == [1, 2, 3, 4]


START_LINES = ["parameters", "layout", "steps", "predicted", "begins"]


def test_without_a_terminal_each_event_is_a_plain_line(straight: Path) -> None:
    text = (straight / "log").read_text()
    assert "\r" not in text
    assert "\x1b" not in text
    assert [line.split()[0] for line in text.splitlines()[:5]] == START_LINES
    expected = [
        r"step 0  train loss \d\.\d{4}  perplexity [\d.]+",
        r"step 1/4  loss \d\.\d{4}  norm [\d.]+  lr 5.00e-04  [\d,]+ tok/s  mfu [\d.]+%  mem [\d.]+ GiB  eta [\d:]+",
        r"step 4  saved .*step_00000004 in [\d.]+ s, [\d.]+ s of them waited for",
        r"step 4  done",
    ]
    for pattern in expected:
        assert len(re.findall(f"^{pattern}$", text, re.MULTILINE)) == 1, pattern


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "tp2": (2, ["parallel.tensor=2"]),
    "dp2-zero3": (2, ["zero.stage=3"]),
    "dp2-zero1-bf16": (2, ["zero.stage=1", "train.dtype=bf16"]),
}


PP2 = [
    "parallel.pipeline=2",
    "model.num_hidden_layers=5",
    "train.micro_batch_size=1",
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_stopped_after_step_2_goes_on_as_if_it_had_not(layout: str, byte_dataset: str, tmp_path: Path) -> None:
    world_size, overrides = LAYOUTS[layout]
    done = [(0, "")] * world_size

    def train(name: str, *more: str) -> Path:
        words = arguments(byte_dataset, tmp_path / name, *overrides, *more)
        assert pretrain(world_size, words) == done
        return tmp_path / name

    whole = train("whole")
    parts = train("parts", "train.stop_after=2")
    assert [event["step"] for event in events(parts, "train")] == [1, 2]
    stop = events(parts)[-1]
    assert stop["event"] == "stop"
    assert (stop["step"], stop["reason"], stop["status"]) == (2, "stopped by train.stop_after", "stopped")
    train("parts")
    assert [(event["step"], event["samples"]) for event in events(parts, "resume")] == [(2, 8)]
    for key in ("step", "samples", "loss", "grad_norm", "lr"):
        assert [e[key] for e in events(parts, "train")] == [e[key] for e in events(whole, "train")]
    assert evaluations(parts) == evaluations(whole)
    assert_same_tensors(parts, whole)


def test_a_finished_run_started_again_trains_nothing(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run")
    for _ in range(2):
        assert pretrain(1, words) == [(0, "")]
    assert [event["step"] for event in events(tmp_path / "run", "train")] == [1, 2, 3, 4]
    assert [event["reason"] for event in events(tmp_path / "run", "stop")] == ["done", "done"]


@pytest.mark.parametrize("world_size", [1, 2], ids=["one process", "tp2"])
def test_the_norm_reported_is_the_unclipped_one_and_the_update_the_clipped(
    world_size: int, straight: Path, byte_dataset: str, tmp_path: Path
) -> None:
    clip = 1e-3
    more = [f"parallel.tensor={world_size}", f"optimizer.clip={clip}", "checkpoint.every=1", "train.stop_after=1"]
    pretrain(world_size, arguments(byte_dataset, tmp_path / "run", *more))
    (clipped,) = events(tmp_path / "run", "train")
    norm = events(straight / "run", "train")[0]["grad_norm"]
    assert clipped["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 100 * clip
    tensors = read_tensors(tmp_path / "run" / "checkpoints" / "step_00000001")
    moments = [tensors[moment_name(EXP_AVG, name)] for name in tensors if is_weight(name)]
    # After one step Adam's first moment is a tenth of the gradient that it was given.
    assert float(total_norm(moments)) / 0.1 == pytest.approx(clip, rel=1e-4)


HOST = "zero.offload_optimizer=cpu"


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.tensor=2"],
        ["parallel.tensor=2", "zero.stage=3"],
        ["zero.stage=1"],
        ["zero.stage=2"],
        ["zero.stage=3"],
        ["zero.stage=1", HOST],
        ["parallel.tensor=2", HOST, "train.dtype=bf16"],
    ],
    ids=["tp2", "tp2-zero3", "dp2-zero1", "dp2-zero2", "dp2-zero3", "dp2-host", "tp2-host-bf16"],
)
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(
    overrides: list[str], byte_dataset: str, tmp_path: Path
) -> None:
    words = arguments(byte_dataset, tmp_path / "run", *overrides)
    for hashes in run_ranks(watch_steps, 2, words):
        changed = [before != after for before, after in hashes]
        assert changed == [True, False, True, True], "weights, masters and moments rest in step 2 alone"
    assert [(e["step"], e["samples"]) for e in events(tmp_path / "run", "skip")] == [(2, 8)]
    norms = [event["grad_norm"] for event in events(tmp_path / "run", "train")]
    assert [norm is None for norm in norms] == [False, True, False, False], "JSON has no infinity"
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000004" / "state.json").read_text())["state"]
    assert (state["step"], state["samples"], state["updates"]) == (4, 16, 3)


AVERAGE = "train.average.kind=exponential"
PIPELINES = {
    f"{schedule} {dtype}": [f"parallel.schedule={schedule}", f"train.dtype={dtype}", *PP2]
    for schedule in ("1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble")
    for dtype in ("fp32", "bf16")
}
PIPELINES["dualpipev bf16"].append(AVERAGE)
IN_EVERY_RUN = ("1f1b fp32", "dualpipev bf16")


@pytest.mark.parametrize(
    "overrides", [["zero.stage=1"], ["zero.stage=3", AVERAGE], *(PIPELINES[name] for name in IN_EVERY_RUN)]
)
def test_evaluation_touches_nothing(overrides: list[str], byte_dataset: str, tmp_path: Path) -> None:
    assert_evaluation_touches_nothing(overrides, byte_dataset, tmp_path)


@pytest.mark.layouts
@pytest.mark.parametrize("pipeline", [name for name in PIPELINES if name not in IN_EVERY_RUN])
def test_evaluation_touches_nothing_in_any_pipeline(pipeline: str, byte_dataset: str, tmp_path: Path) -> None:
    assert_evaluation_touches_nothing(PIPELINES[pipeline], byte_dataset, tmp_path)


def assert_evaluation_touches_nothing(overrides: list[str], dataset: str, folder: Path) -> None:
    """Neither weight nor moment nor generator, nor the gradients that wait for their step."""
    runs = {every: folder / f"every-{every}" for every in (0, 1)}
    for every, run_dir in runs.items():
        words = arguments(dataset, run_dir, *overrides, f"evaluation.every={every}")
        for hashes in run_ranks(watch_evaluations, 2, words, every):
            assert len(hashes) == (5 + 4 if every else 2)
            assert [before == after for before, after in hashes] == [True] * len(hashes)
    assert losses(runs[0]) == losses(runs[1])
    assert_same_tensors(runs[0], runs[1])


@pytest.mark.layouts
@needs_compiler
def test_a_compiled_pipeline_trains_as_one_that_is_not(byte_dataset: str, tmp_path: Path) -> None:
    pipeline = ["parallel.pipeline=2", "parallel.schedule=interleaved1f1b", "model.num_hidden_layers=4"]
    plain, compiled, cache = tmp_path / "plain", tmp_path / "compiled", tmp_path / "cache"
    assert pretrain(2, arguments(byte_dataset, plain, *pipeline)) == [(0, "")] * 2
    words = arguments(byte_dataset, compiled, *pipeline, "train.compile=true")
    assert pretrain(2, words, plant=partial(compile_into, str(cache))) == [(0, "")] * 2
    assert list(cache.rglob("*.so")), "nothing was compiled"
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-6)
    evaluated = [[event["loss"] for event in events(run_dir, "eval")] for run_dir in (compiled, plain)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-6)


def test_a_run_that_insists_on_a_compiler_is_told_what_is_missing(byte_dataset: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    refused = pretrain(2, arguments(byte_dataset, run_dir, "train.compile=true"), plant=without_compiler)
    sentence = (
        "megallama: train.compile=true needs a C++ compiler and the headers of Python, and some of it is not here; "
        "install it, or use train.compile=auto\n"
    )
    assert [code for code, _ in refused] == [2, 2]
    assert sentence in [said for _, said in refused]


def without_compiler() -> None:
    os.environ["CXX"] = "no-compiler"


def compile_into(folder: str) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder


def watch_steps(launch: Launch, words: list[str]) -> list[tuple[str, str]]:
    """Hashes of all state around each step; one gradient of the last rank is not finite in step 2."""
    seen: list[tuple[str, str]] = []

    def plant() -> None:
        import megallama.train.loop

        original = megallama.train.loop.train_step

        def watched(run: Any, *rest: Any) -> Any:
            if len(seen) == 1 and launch.rank == launch.world_size - 1:
                poison_next_gradient(run.model.models[0].layers["1"].mlp.down_proj.weight)
            return around(seen, run, lambda: original(run, *rest))

        megallama.train.loop.train_step = watched

    assert pretrain_here(launch, words, plant) == (0, "")
    return seen


def watch_evaluations(launch: Launch, words: list[str], between: int) -> list[tuple[str, str]]:
    """Hashes of all state around each evaluation, with `between` also before each step, when gradients are there."""
    seen: list[tuple[str, str]] = []

    def plant() -> None:
        import megallama.train.loop

        evaluate, original = megallama.train.loop.evaluate_splits, megallama.train.loop.train_step

        def watched(run: Any, state: Any) -> Any:
            return around(seen, run, lambda: evaluate(run, state))

        def between_passes(run: Any) -> Any:
            return around(seen, run, lambda: megallama.train.loop.evaluate(run.engine, run.data.train, 4, run.mesh))

        def train_step(run: Any, *rest: Any) -> Any:
            step = run.engine.step
            if between:
                run.engine.step = lambda *given: (between_passes(run), step(*given))[1]
            done = original(run, *rest)
            run.engine.step = step
            return done

        megallama.train.loop.evaluate_splits = watched
        megallama.train.loop.train_step = train_step

    assert pretrain_here(launch, words, plant) == (0, "")
    return seen


def around(seen: list[tuple[str, str]], run: Any, call: Callable[[], Any]) -> Any:
    before = state_hash(run)
    result = call()
    seen.append((before, state_hash(run)))
    return result


def poison_next_gradient(parameter: Tensor) -> None:
    def poison(gradient: Tensor) -> Tensor:
        handle.remove()
        return gradient * math.nan

    handle = parameter.register_hook(poison)


def state_hash(run: Any) -> str:
    """Of this rank's weights, their gradients, master weights, moments and averages, and of its random generator."""
    digest = hashlib.sha256(torch.get_rng_state().numpy().tobytes())
    for parameter in run.model.parameters():
        held = getattr(parameter, "ds_tensor", parameter)  # what ZeRO 3 keeps of a parameter
        for tensor in (held, parameter.grad):
            digest.update(b"none" if tensor is None else tensor.detach().cpu().view(torch.uint8).numpy().tobytes())
    for fragment in run.engine.fragments():
        average = [] if fragment.average is None else [fragment.average]
        for tensor in (fragment.master, *fragment.moments.values(), *average):
            digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def total_norm(tensors: list[Tensor]) -> Tensor:
    return torch.stack([tensor.double().norm() for tensor in tensors]).norm()


def evaluations(run_dir: Path) -> list[tuple[int, str, float]]:
    return [(event["step"], event["split"], event["loss"]) for event in events(run_dir, "eval")]


def assert_same_tensors(run_dir: Path, other: Path) -> None:
    """Weights and moments of the last checkpoint, bit for bit."""
    ours, theirs = (read_tensors(path / "checkpoints" / "step_00000004") for path in (run_dir, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def test_without_validation_data_a_step_is_evaluated_once(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path, "data.validation_fraction=0", "evaluation.every=2", "train.steps=4")
    assert pretrain(1, [*words, "train.stop_after=2"]) == [(0, "")]
    assert pretrain(1, words) == [(0, "")]
    assert [event["step"] for event in events(tmp_path, "eval")] == [0, 2, 4]


def refuse_to_draw() -> None:
    import megallama.train.saves

    def refused(*_: object) -> None:
        raise AssertionError("weights are drawn")

    megallama.train.saves.draw_weights = refused


def test_a_start_that_loads_weights_draws_none(byte_dataset: str, tmp_path: Path) -> None:
    words = arguments(byte_dataset, tmp_path / "run", "train.steps=4")
    assert pretrain(1, [*words, "train.stop_after=2"]) == [(0, "")]
    assert pretrain(1, words, plant=refuse_to_draw) == [(0, "")]
    others = arguments(byte_dataset, tmp_path / "other", "train.steps=4")
    weights = f"checkpoint.init_from={tmp_path / 'run' / 'checkpoints' / 'step_00000004'}"
    assert pretrain(1, [*others, weights], plant=refuse_to_draw) == [(0, "")]
    with pytest.raises(RankFailedError, match="weights are drawn"):
        pretrain(1, arguments(byte_dataset, tmp_path / "fresh"), plant=refuse_to_draw)


def test_deterministic_kernels_give_the_losses_of_any_run_on_a_cpu(byte_dataset: str, tmp_path: Path) -> None:
    found = []
    for name, more in (("plain", []), ("deterministic", ["train.deterministic=true"])):
        assert pretrain(1, arguments(byte_dataset, tmp_path / name, "train.steps=3", *more)) == [(0, "")]
        found.append([event["loss"] for event in events(tmp_path / name, "train")])
    assert found[0] == found[1] != []
