"""The promise "any layout, one checkpoint": saved anywhere, resumed anywhere; at the same layout to the bit."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import megallama.train.loop
from megallama.checkpoint.format import complete_checkpoints
from megallama.checkpoint.reading.store import load
from megallama.checkpoint.state import DataIdentity, state_document
from megallama.checkpoint.writing.commit import Retention
from megallama.checkpoint.writing.saver import Saver
from megallama.config.schema import RunConfig
from megallama.data.source import Windows
from megallama.layout.check import check_config
from megallama.layout.names import parse_layout
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks
from megallama.train.run import build_model
from megallama.verify.compare import BOUNDS, read_tensors
from megallama.verify.shrink import shrink
from megallama.verify.verify import train_rank, write_dataset
from tests.verify.test_parity import debug_config

# Every layer and sample is paid for by each of some hundred runs: no more layers than leave the stages uneven, no more
# samples than the copies and micro-batches of all layouts divide.
LAYERS, BATCH = 5, 24
STEPS, INTERRUPTED = 6, 3

LAYOUTS = [
    "zero1",
    "tp2-dp2-zero2",
    "tp4",
    "pp2-interleaved1f1b-cp2",
    "pp4-acc6",
    "dp4-zero3",
    "tp2-pp2-zbvzerobubble-acc4",
    "pp2-dualpipev-dp2-acc4",
]
# In fp32 masters are the weights themselves at ZeRO 1 (zero1, dp2-zero1), else both types go the same way.
RESUMED = [
    *((layout, dtype) for layout in ("zero1", "dp2-zero1", "dp2-zero3", "pp2-acc4") for dtype in ("fp32", "bf16")),
    *((f"pp2-{schedule}-acc4", "bf16") for schedule in ("interleaved1f1b", "dualpipev", "zbvzerobubble")),
    *((layout, "bf16") for layout in ("dp2-zero2", "tp2", "tp2-pp2", "cp2", "cp2-ulysses", "dp2-host")),
    ("pp2-dualpipev-host-acc4", "bf16"),
]
IN_EVERY_RUN = [("pp2-dualpipev-acc4", "bf16")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def run(folder: Path, dataset: Path, layout: str, dtype: str = "fp32", **train: object) -> RunConfig:
    tree = shrink(debug_config(), folder, dataset, STEPS, dtype, LAYERS, BATCH).model_dump()
    parse_layout(layout).apply(tree)
    tree["checkpoint"]["resume"] = "auto"
    tree["train"]["average"] = {"kind": "exponential", "decay": 0.5}  # a kind of tensor more; no loss knows it
    tree["train"] |= train
    return RunConfig.model_validate(tree)


Rows = dict[int, int]
"""A checksum of the tokens of each sample of the run, by its number."""


def train(config: RunConfig, layout: str) -> Rows:
    """What was read, over all ranks."""
    return merged(run_ranks(train_recorded, parse_layout(layout).world_size, config))


def merged(ranks: list[Rows]) -> Rows:
    """Ranks that read the same sample must have read the same tokens."""
    every: Rows = {}
    for rows in ranks:
        assert all(every.setdefault(sample, row) == row for sample, row in rows.items())
    return every


def train_recorded(launch: Launch, config: RunConfig) -> Rows:
    """One rank of a run. Its loop draws no random number: that is why a checkpoint holds no generator."""
    rows: Rows = {}
    read, loop = Windows.sample, megallama.train.loop.loop

    def recorded(source: Windows, number: int) -> Any:
        row = read(source, number)
        if source.sampler is not None:
            rows[number] = zlib.crc32(row.tobytes())
        return row

    def undisturbed(*arguments: Any) -> Any:
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
        ending = loop(*arguments)
        after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
        assert torch.equal(before[0], after[0])
        assert before[1:] == after[1:]
        return ending

    Windows.sample, megallama.train.loop.loop = recorded, undisturbed  # type: ignore[method-assign]
    train_rank(launch, config, None)
    return rows


def of_steps(rows: Rows, first: int, last: int) -> Rows:
    """The samples of steps first ... last, counted from 1."""
    return {sample: rows[sample] for sample in range((first - 1) * BATCH, last * BATCH)}


def events(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == "train"]


def hashes(checkpoint: Path) -> dict[str, str]:
    tensors = read_tensors(checkpoint)
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


def assert_resumes_bitwise(layout: str, dtype: str, dataset: Path, folder: Path) -> None:
    straight, broken = folder / "straight", folder / "broken"
    expected_rows = train(run(straight, dataset, layout, dtype), layout)
    train(run(broken, dataset, layout, dtype, stop_after=INTERRUPTED), layout)
    rows = train(run(broken, dataset, layout, dtype), layout)
    assert of_steps(rows, INTERRUPTED + 1, STEPS) == of_steps(expected_rows, INTERRUPTED + 1, STEPS)
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
def saved(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """A run of each layout, saved after every step, and what each of them read."""
    folder = tmp_path_factory.mktemp("saved")
    rows = [of_steps(train(run(folder / layout, dataset, layout), layout), 1, STEPS) for layout in LAYOUTS]
    assert all(other == rows[0] for other in rows)
    assert len(set(rows[0].values())) == STEPS * BATCH, "every sample is another"
    return folder, rows[0]


# Who writes knows nothing of who reads: each layout reads what two others wrote, another two read what it wrote.
PAIRS = [(here, LAYOUTS[(place + by) % len(LAYOUTS)]) for by in (1, 3) for place, here in enumerate(LAYOUTS)]


@pytest.mark.layouts
@pytest.mark.parametrize(("here", "there"), PAIRS)
def test_saved_here_resumed_there(
    here: str, there: str, saved: tuple[Path, Rows], dataset: Path, tmp_path: Path
) -> None:
    """What is read is what was written, to the bit; the next three losses and samples are the undisturbed run's."""
    folder, expected_rows = saved
    assert_goes_on(folder / here, expected_rows, run(tmp_path, dataset, there), there, bound=1e-6)


@pytest.mark.layouts
@pytest.mark.parametrize(
    ("here", "there"),
    [
        (("zero1", "fp32"), ("zero1", "bf16")),
        (("zero1", "bf16"), ("zero1", "fp32")),
        (("tp2", "fp32"), ("dp2-zero2", "bf16")),
        (("dp2-zero2", "bf16"), ("tp2", "fp32")),
    ],
)
def test_saved_in_one_type_resumed_in_the_other(
    here: tuple[str, str], there: tuple[str, str], dataset: Path, tmp_path: Path
) -> None:
    """Masters and moments are fp32 in both: only what the forward pass rounds is another."""
    rows = train(run(tmp_path / "here", dataset, *here), here[0])
    config = run(tmp_path / "there", dataset, *there)
    assert_goes_on(tmp_path / "here", rows, config, there[0], bound=BOUNDS["bf16"].loss)


def assert_goes_on(saved: Path, expected_rows: Rows, config: RunConfig, layout: str, bound: float) -> None:
    """`config` reads what the run at `saved` wrote in its middle, and its losses are that run's within `bound`."""
    folder, name = Path(config.run.dir), f"step_{INTERRUPTED:08d}"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / name).symlink_to(saved / "checkpoints" / name)
    rows = merged(run_ranks(copy_then_train, parse_layout(layout).world_size, config, folder / "copy"))
    assert of_steps(rows, INTERRUPTED + 1, STEPS) == of_steps(expected_rows, INTERRUPTED + 1, STEPS)
    assert hashes(folder / "copy" / name) == hashes(saved / "checkpoints" / name)
    expected = events(saved)[INTERRUPTED:]
    found = events(folder)
    assert [event["samples"] for event in found] == [event["samples"] for event in expected]
    assert [event["loss"] for event in found] == pytest.approx([event["loss"] for event in expected], rel=bound)


def copy_then_train(launch: Launch, config: RunConfig, copy: Path) -> Rows:
    """Load the newest checkpoint and save it again at once; then resume it in the ordinary way."""
    device = torch.device("cpu")
    launch.prepare(device)
    batching, parallel = check_config(config, launch.world_size), config.parallel
    mesh = build_mesh(Topology(dp=batching.dp_size, **parallel.sizes), launch, device)
    model, engine = build_model(config, mesh)
    state = load(complete_checkpoints(Path(config.run.dir) / "checkpoints")[0], engine, model)
    saver = Saver(copy, engine, model, mesh, Retention(keep=1))
    saver.save(state.step, state_document(state, 0.0, True, DataIdentity("", 0), config.model, {}))
    saver.close()
    return train_recorded(launch, config)
