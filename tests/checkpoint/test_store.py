"""Checkpoints of real runs: continued bitwise at the same layout, and never read as something else."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from megallama.checkpoint.format import BEST, LATEST, MANIFEST, STATE, TENSORS, complete_checkpoints
from megallama.checkpoint.reading.store import load_weights
from megallama.checkpoint.state import read_saved
from megallama.checkpoint.tensors import Stored
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.generation.load import load_model
from megallama.layout.names import parse_layout
from megallama.parallel.launch import Launch
from megallama.parallel.spawn import RankFailedError, run_ranks
from megallama.verify.compare import events_of, read_tensors
from megallama.verify.shrink import shrink
from megallama.verify.verify import train_rank, write_dataset
from tests.checkpoint.damaging import Bomb, bomb, plant
from tests.verify.test_parity import debug_config

STEPS = 5


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_ranks(train_rank, 1, settings(folder, dataset, "zero1"), None)
    return folder


def settings(folder: Path, dataset: Path, layout: str, dtype: str = "fp32", **checkpoint: object) -> RunConfig:
    tree = shrink(debug_config(), folder, dataset, STEPS, dtype).model_dump()
    parse_layout(layout).apply(tree)
    tree["checkpoint"] |= {"resume": "auto", **checkpoint}
    return RunConfig.model_validate(tree)


def stopped_after(config: RunConfig, step: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"stop_after": step})})


def losses(folder: Path) -> dict[int, str]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: float(line["loss"]).hex() for line in lines if line["event"] == "train"}


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [("zero1", "bf16"), ("dp2-zero3", "bf16"), ("tp2-dp2", "fp32")],
)
def test_an_interrupted_run_repeats_the_straight_run_bitwise(
    layout: str, dtype: str, dataset: Path, tmp_path: Path
) -> None:
    ranks = parse_layout(layout).world_size
    straight, broken = (settings(tmp_path / name, dataset, layout, dtype) for name in ("straight", "broken"))
    run_ranks(train_rank, ranks, straight, None)
    run_ranks(train_rank, ranks, stopped_after(broken, 3), None)
    run_ranks(train_rank, ranks, broken, None)
    assert losses(tmp_path / "broken") == losses(tmp_path / "straight")
    last = f"checkpoints/step_{STEPS:08d}"
    expected, found = read_tensors(tmp_path / "straight" / last), read_tensors(tmp_path / "broken" / last)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_names_are_those_of_hugging_face_and_shapes_are_whole(finished: Path) -> None:
    shapes = Stored(complete_checkpoints(finished / "checkpoints")[0]).shapes
    weights = {name: shape for name, shape in shapes.items() if not name.startswith("optimizer.")}
    assert weights["model.embed_tokens.weight"] == (257, 64)
    assert weights["model.layers.1.self_attn.k_proj.weight"] == (32, 64)
    assert weights["model.layers.0.mlp.down_proj.weight"] == (64, 160)
    assert weights["lm_head.weight"] == (257, 64)
    assert len(shapes) == 3 * len(weights) == 3 * (2 * 9 + 3)


def test_a_checkpoint_without_manifest_or_state_does_not_exist(finished: Path, dataset: Path, tmp_path: Path) -> None:
    run_ranks(train_rank, 1, stopped_after(settings(tmp_path, dataset, "zero1"), 3), None)
    newest, second, *_ = complete_checkpoints(tmp_path / "checkpoints")
    (newest / MANIFEST).unlink()
    assert complete_checkpoints(tmp_path / "checkpoints")[0] == second
    (second / STATE).unlink()
    assert second not in complete_checkpoints(tmp_path / "checkpoints")


def test_only_the_newest_are_kept_and_latest_names_the_last(dataset: Path, tmp_path: Path) -> None:
    run_ranks(train_rank, 1, settings(tmp_path, dataset, "zero1", keep=2), None)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [BEST, LATEST, "step_00000004", "step_00000005"]
    assert (tmp_path / "checkpoints" / LATEST).read_text() == "step_00000005"


def test_the_best_by_validation_loss_is_kept_beside_the_newest(dataset: Path, tmp_path: Path) -> None:
    """At a rate that ruins the model in the end, but not in the first steps."""
    tree = settings(tmp_path, dataset, "zero1", keep=1).model_dump()
    tree["optimizer"]["lr"] = 0.05
    tree["evaluation"]["every"] = 1
    run_ranks(train_rank, 1, RunConfig.model_validate(tree), None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = {e["step"]: e["loss"] for e in lines if e["event"] == "eval" and e["split"] == "validation" and e["step"]}
    best = min(losses, key=lambda step: losses[step])
    assert best < STEPS
    folder = tmp_path / "checkpoints"
    assert [p.name for p in complete_checkpoints(folder)] == [f"step_{STEPS:08d}", f"step_{best:08d}"]
    assert (folder / BEST).read_text() == f"step_{best:08d}"
    assert read_saved(folder / f"step_{best:08d}").state.validation_loss == losses[best]


def test_a_run_that_starts_over_loses_nothing_of_the_one_before(dataset: Path, tmp_path: Path) -> None:
    run_ranks(train_rank, 1, settings(tmp_path, dataset, "zero1"), None)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    over = settings(tmp_path, dataset, "zero1", resume="never", keep=2)
    run_ranks(train_rank, 1, stopped_after(over, 2), None)
    run_ranks(train_rank, 1, stopped_after(over, 1), None)
    assert [p.name for p in complete_checkpoints(tmp_path / "checkpoints")] == ["step_00000001"]
    assert [p.name for p in complete_checkpoints(tmp_path / "checkpoints.2")] == ["step_00000002", "step_00000001"]
    assert complete_checkpoints(tmp_path / "checkpoints.1")[0].name == "step_00000005"
    assert (tmp_path / "metrics.jsonl.1").read_bytes() == before


def test_weights_of_the_run_itself_are_refused(finished: Path, dataset: Path) -> None:
    source = complete_checkpoints(finished / "checkpoints")[0]
    config = settings(finished, dataset, "zero1", resume="never", init_from=str(source))
    with pytest.raises(RankFailedError, match=r"is a checkpoint of run\.dir itself; use another run\.dir"):
        run_ranks(train_rank, 1, config, None)
    assert source.is_dir()


def test_a_new_run_begins_with_the_weights_of_another(finished: Path, dataset: Path, tmp_path: Path) -> None:
    source = tmp_path / "link"
    source.symlink_to(complete_checkpoints(finished / "checkpoints")[0])
    config = settings(tmp_path, dataset, "tp2", init_from=str(source), every=0)
    run_ranks(train_rank, 2, config, None)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    before = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    first = next(line["loss"] for line in lines if line["event"] == "eval")
    last = [line["loss"] for line in before if line["event"] == "eval" and line["split"] == "train"][-1]
    assert first == pytest.approx(last, rel=1e-6)
    assert next(line for line in lines if line["event"] == "train")["step"] == 1


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": {"hidden_size": 128}}, "model.hidden_size=128 differs from 64"),
        ({"train": {"seed": 7}}, "train.seed=7 differs from 1234"),
        (
            {"data": {"validation_fraction": 0.3}},
            "(data.path, data.pack, data.document_mask, data.truncate, data.pad or the split) is not that of",
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    change: dict[str, dict[str, object]], sentence: str, finished: Path, dataset: Path
) -> None:
    tree = settings(finished, dataset, "zero1").model_dump()
    for section, values in change.items():
        tree[section] |= values
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(RankFailedError, match="UserError") as refused:
        run_ranks(train_rank, 1, RunConfig.model_validate(tree), None)
    assert sentence in str(refused.value)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_code_planted_in_a_checkpoint_does_not_run(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = shutil.copytree(complete_checkpoints(finished / "checkpoints")[0], tmp_path / "step_00000005")
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))  # what torch.distributed.checkpoint would unpickle
    load_weights(path)
    for name in ("rank_00000.bin", TENSORS, STATE, MANIFEST):
        sound = (path / name).read_bytes()
        bomb(path / name)
        with pytest.raises(UserError, match=f"damaged .*{name}"):
            load_weights(path)
        (path / name).write_bytes(sound)
    load_weights(path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", [TENSORS, STATE])
def test_code_planted_with_its_hash_is_text_that_is_malformed(
    name: str, finished: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    path, before, *_ = complete_checkpoints(run / "checkpoints")
    new, again = settings(tmp_path / "new", dataset, "zero1", init_from=str(path)), settings(run, dataset, "zero1")
    monkeypatch.chdir(tmp_path)
    plant(path / name)
    with pytest.raises(UserError, match=f"damaged .*{name} is malformed: "):
        load_weights(path)
    with pytest.raises(UserError, match=f"damaged .*{name} is malformed: "):
        load_model(run)
    with pytest.raises(RankFailedError, match=rf"UserError: checkpoint.init_from=.* is damaged \({name} is malformed"):
        run_ranks(train_rank, 1, new, None)
    run_ranks(train_rank, 1, again, None)
    assert [event["path"] for event in events_of(run, "resume")] == [str(before)]
    (notice,) = [event["text"] for event in events_of(run, "notice")]
    assert f"passed over {path.name}: {name} is malformed: " in notice
    assert not list(tmp_path.rglob("exploded"))


def test_code_planted_with_its_hash_is_read_as_numbers(
    finished: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    path = complete_checkpoints(run / "checkpoints")[0]
    tree = settings(run, dataset, "zero1", resume="must").model_dump()
    tree["train"]["steps"] = STEPS + 1
    monkeypatch.chdir(tmp_path)
    plant(path / "rank_00000.bin")
    content = (path / "rank_00000.bin").read_bytes()
    places = json.loads((path / TENSORS).read_bytes())["tensors"]
    for name, weight in load_weights(path).items():
        (chunk,) = places[name]["chunks"]
        assert weight.numpy().tobytes() == content[chunk["start"] :][: weight.nbytes], name
    run_ranks(train_rank, 1, RunConfig.model_validate(tree), None)
    assert [event["path"] for event in events_of(run, "resume")] == [str(path)]
    assert not list(tmp_path.rglob("exploded"))
    run_ranks(unpickle, 1, path / "rank_00000.bin")
    assert (tmp_path / "exploded").exists(), "here a rank would have left it"


def unpickle(_: Launch, path: Path) -> None:
    pickle.loads(path.read_bytes())
