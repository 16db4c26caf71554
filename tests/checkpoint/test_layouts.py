"""The promise "any layout, one checkpoint": saved anywhere, resumed anywhere; at the same layout to the bit."""

from __future__ import annotations

import hashlib
import json
from itertools import permutations
from pathlib import Path

import pytest
import torch

from megallama.checkpoint.store import DataIdentity, complete_checkpoints, load, save
from megallama.config.check import check_config
from megallama.config.schema import RunConfig
from megallama.parallel.mesh import Launch, build_mesh
from megallama.parallel.spawn import run_ranks
from megallama.parallel.topology import Topology
from megallama.train import build_model
from megallama.verify.compare import read_tensors
from megallama.verify.layout import parse_layout
from megallama.verify.shrink import shrink
from megallama.verify.verify import train_rank, write_dataset
from tests.verify.test_parity import debug_config

LAYERS, BATCH = 9, 40
STEPS, INTERRUPTED = 6, 3

LAYOUTS = [
    "zero1",
    "tp2-dp2-zero2",
    "tp4",
    "pp2-interleaved1f1b",
    "pp4-acc5",
    "dp4-zero3",
    "tp2-pp2-zbvzerobubble-acc4",
    "pp2-dualpipev-dp2-acc4",
]
RESUMED = [
    *(("zero1", dtype) for dtype in ("fp32", "bf16")),
    *((f"dp2-zero{stage}", dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")),
    *(("tp2", dtype) for dtype in ("fp32", "bf16")),
    *(
        (f"pp2{schedule}-acc4", dtype)
        for schedule in ("", "-interleaved1f1b", "-dualpipev", "-zbvzerobubble")
        for dtype in ("fp32", "bf16")
    ),
    *(("tp2-pp2", dtype) for dtype in ("fp32", "bf16")),
]
IN_EVERY_RUN = [("pp2-dualpipev-acc4", "bf16")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def run(folder: Path, dataset: Path, layout: str, dtype: str = "fp32", **train: object) -> RunConfig:
    tree = shrink(debug_config(), folder, dataset, STEPS, dtype, LAYERS, BATCH).model_dump()
    parse_layout(layout).apply(tree)
    tree["checkpoint"]["resume"] = "auto"
    tree["train"] |= train
    return RunConfig.model_validate(tree)


def train(config: RunConfig, layout: str) -> None:
    run_ranks(train_rank, parse_layout(layout).world_size, config, None)


def events(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "train"]


def hashes(checkpoint: Path) -> dict[str, str]:
    tensors = read_tensors(checkpoint)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def assert_resumes_bitwise(layout: str, dtype: str, dataset: Path, folder: Path) -> None:
    straight, broken = folder / "straight", folder / "broken"
    train(run(straight, dataset, layout, dtype), layout)
    train(run(broken, dataset, layout, dtype, stop_after=INTERRUPTED), layout)
    train(run(broken, dataset, layout, dtype), layout)
    for key in ("loss", "grad_norm", "samples"):
        expected, found = ([float(event[key]).hex() for event in events(where)] for where in (straight, broken))
        assert expected == found, key
    last = f"checkpoints/step_{STEPS:08d}"
    assert hashes(straight / last) == hashes(broken / last)


@pytest.mark.parametrize(("layout", "dtype"), IN_EVERY_RUN)
def test_a_layout_goes_on_as_if_nothing_had_happened(layout: str, dtype: str, dataset: Path, tmp_path: Path) -> None:
    assert_resumes_bitwise(layout, dtype, dataset, tmp_path)


@pytest.mark.layouts
@pytest.mark.parametrize(("layout", "dtype"), [case for case in RESUMED if case not in IN_EVERY_RUN])
def test_every_layout_goes_on_as_if_nothing_had_happened(
    layout: str, dtype: str, dataset: Path, tmp_path: Path
) -> None:
    assert_resumes_bitwise(layout, dtype, dataset, tmp_path)


@pytest.fixture(scope="module")
def saved(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each layout, saved after every step."""
    folder = tmp_path_factory.mktemp("saved")
    for layout in LAYOUTS:
        train(run(folder / layout, dataset, layout), layout)
    return folder


@pytest.mark.layouts
@pytest.mark.parametrize(("here", "there"), list(permutations(LAYOUTS, 2)))
def test_saved_here_resumed_there(here: str, there: str, saved: Path, dataset: Path, tmp_path: Path) -> None:
    """What is read is what was written, to the bit, and the next three losses are those of the undisturbed run."""
    name = f"step_{INTERRUPTED:08d}"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / name).symlink_to(saved / here / "checkpoints" / name)
    config = run(tmp_path, dataset, there)
    run_ranks(copy_then_train, parse_layout(there).world_size, config, tmp_path / "copy")
    assert hashes(tmp_path / "copy" / name) == hashes(saved / here / "checkpoints" / name)
    expected = events(saved / here)[INTERRUPTED:]
    found = events(tmp_path)
    assert [event["samples"] for event in found] == [event["samples"] for event in expected]
    assert [event["loss"] for event in found] == pytest.approx([event["loss"] for event in expected], rel=1e-6)


def copy_then_train(launch: Launch, config: RunConfig, copy: Path) -> None:
    """Load the newest checkpoint and save it again at once; then resume it in the ordinary way."""
    device = torch.device("cpu")
    launch.prepare(device)
    batching, parallel = check_config(config, launch.world_size), config.parallel
    mesh = build_mesh(Topology(pp=parallel.pipeline, dp=batching.dp_size, tp=parallel.tensor), launch, device)
    model, engine = build_model(config, mesh, batching.gradient_accumulation_steps)
    state = load(complete_checkpoints(Path(config.run.dir) / "checkpoints")[0], engine, model)
    save(copy, engine, model, mesh, state, DataIdentity("", 0), keep=1)
    train_rank(launch, config, None)
