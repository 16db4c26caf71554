"""Steps that stand out are skipped, and after several in a row the run goes back and passes over their samples."""

from __future__ import annotations

import hashlib
import json
import math
import re
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megallama.checkpoint.state import read_saved, seen_before
from megallama.config.load import load_config
from megallama.corpus.building.build import build_dataset
from megallama.data.mixture import open_train
from megallama.data.trace import trace
from megallama.run_dir.events import standing_events
from megallama.train.diagnosis import where_not_finite
from megallama.train.layer_norms import LayerNorms
from tests.launching import CONFIG, arguments, events, pretrain

BATCH = 4
BAD = range(34 * BATCH, 37 * BATCH)
"""What steps 35 to 37 read first, in the order of the data."""


def words(dataset: str, run_dir: Path, *more: str) -> list[str]:
    """Forty steps that save every fifth; two skipped in a row are too many."""
    health = ["health.window=16", "health.spike_deviations=12", "train.max_skipped=2"]
    length = ["train.steps=40", "optimizer.lr=1e-2", "checkpoint.every=5", "checkpoint.keep=20", "evaluation.every=0"]
    return arguments(dataset, run_dir, *length, *health, *more)


def spoiled(numbers: range) -> None:
    """The samples of these numbers, in the order of the data, are noise."""
    import megallama.data.source

    source: Any = megallama.data.source
    sample = source.Windows.sample

    def read(self: Any, number: int) -> Any:
        if number in numbers and self.sampler is not None:
            return np.random.default_rng(number).integers(0, 256, self.sequence_length + 1)
        return sample(self, number)

    source.Windows.sample = read


def saved_state(run: Path, step: int) -> Any:
    return read_saved(run / "checkpoints" / f"step_{step:08d}").state


def final_loss(run: Path) -> float:
    trained = [event for event in standing_events(run) if event["event"] == "train"]
    assert [event["step"] for event in trained] == list(range(1, 41))
    return sum(event["loss"] for event in trained[-2:]) / 2


@pytest.mark.parametrize(("ranks", "layout"), [(1, []), (2, ["parallel.tensor=2", "zero.stage=3"])])
def test_noise_in_the_data_is_skipped_and_then_passed_over(
    byte_dataset: str, tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    run, clean = tmp_path / "run", tmp_path / "clean"
    assert pretrain(ranks, words(byte_dataset, run, *layout), plant=partial(spoiled, BAD)) == [(0, "")] * ranks
    assert pretrain(1, words(byte_dataset, clean)) == [(0, "")]

    skips, (rewind,) = events(run, "skip"), events(run, "rewind")
    assert [(skip["step"], skip["reason"], skip["of_data"]) for skip in skips] == [
        (35, "loss", [136, 140]),
        (36, "loss", [140, 144]),
        (35, "loss", [144, 148]),
    ]
    assert all(skip["loss"] > 5 for skip in skips)
    assert (rewind["step"], rewind["samples"], rewind["passed_over"]) == (30, 120, [136, 144])
    assert rewind["set_aside"] == {"step_00000035": "step_00000035.undone-1"}
    state = saved_state(run, 40)
    assert (state.step, state.samples, state.updates) == (40, 160, 39)
    assert (state.rewinds, state.passed_over) == (1, ((136, 144),))
    assert saved_state(run, 30).passed_over == ()
    assert state.losses[-1] == pytest.approx(events(run, "train")[-1]["loss"], rel=1e-6)
    assert state.norms[-1] == events(run, "train")[-1]["grad_norm"]
    assert final_loss(run) == pytest.approx(final_loss(clean), abs=0.2)


def test_a_run_that_goes_back_too_often_fails_with_a_page_that_says_why(byte_dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = words(byte_dataset, run, "health.max_rewinds=1")
    plant = partial(spoiled, range(BAD.start, 10_000))
    assert pretrain(1, start, plant=plant) == [(1, "")]
    assert [event["passed_over"] for event in events(run, "rewind")] == [[136, 144]]
    outcome = json.loads((run / "outcome.json").read_text())
    assert outcome["reason"].startswith(f"2 steps in a row were skipped, see {run}/diagnosis.txt; try a lower ")
    assert outcome["reason"].endswith(f"`megallama checkpoint rollback {run} 30`")
    page = (run / "diagnosis.txt").read_text()
    assert page.startswith(
        "Steps 35 to 36 were skipped after going back 1 times.\n\nstep 35: a loss far above the last"
    )
    assert "A loss above " in page
    assert "the output of every layer and the gradient there are finite" in page
    assert "\nlayer 1: " in page
    assert "These steps read the samples from 144 up to 152 in the order of the data" in page
    assert "\nsample 144, document " in page


def test_where_numbers_cease_to_be_finite_is_named() -> None:
    fine = [1.0, 2.0, 3.0]
    assert "output of layer 1 is the first" in where_not_finite(LayerNorms([1.0, math.nan, math.inf], [math.nan] * 3))
    assert "gradient at the output of layer 1 is" in where_not_finite(LayerNorms(fine, [math.nan, math.inf, 1.0]))
    assert "are finite" in where_not_finite(LayerNorms(fine, fine))


def test_the_trace_of_a_run_leaves_out_what_the_run_passed_over(byte_dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(1, words(byte_dataset, run), plant=partial(spoiled, BAD)) == [(0, "")]
    config = load_config(Path(CONFIG), words(byte_dataset, run)[2:])
    seen = seen_before(config)
    assert seen.passed_over == ((136, 144),)
    traced = [each.sample for each in trace(config, open_train(config, seen), (33, 36), seen=seen)]
    assert traced == [*range(128, 136), *range(144, 152)]


def test_a_stage_that_going_back_brought_forward_has_begun(byte_dataset: str, tmp_path: Path) -> None:
    (tmp_path / "later.jsonl").write_text(2 * (json.dumps({"text": "What comes later. " * 200}) + "\n"))
    build_dataset([str(tmp_path / "later.jsonl")], str(tmp_path / "later"), "bytes", workers=1)

    def mixture(later: float) -> str:
        begun = {"from_step": 0, "sources": [{"path": byte_dataset, "weight": 1}]}
        weights = {byte_dataset: 1 - later, str(tmp_path / "later"): later}
        sources = [{"path": path, "weight": weight} for path, weight in weights.items()]
        return f"data.mixture={json.dumps([begun, {'from_step': 39, 'sources': sources}])}"

    run = tmp_path / "run"
    start = words(byte_dataset, run, "data.path=null", mixture(0.5), "train.stop_after=39")
    assert pretrain(1, start, plant=partial(spoiled, BAD)) == [(0, "")]
    saved = read_saved(run / "checkpoints" / "step_00000039")
    assert (saved.state.samples, saved.state.passed_over) == (39 * BATCH, ((136, 144),))
    # Sample 148 of the run is number 156 of the data, with which the stage begins.
    assert (saved.state.stages, len(saved.data.mixture)) == ((0, 39 * BATCH), 2)
    go_on = [*start, "train.global_batch_size=2", "train.steps=41", "train.stop_after=null"]
    ((code, said),) = pretrain(1, [*go_on, mixture(0.25)])
    assert (code, "change a stage from_step=40 or later" in said) == (2, True), said
    assert pretrain(1, go_on) == [(0, "")]
    assert saved_state(run, 41).stages == (0, 39 * BATCH)


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        pytest.param(1, [], id="bf16"),
        pytest.param(1, ["train.dtype=fp32"], id="fp32"),
        pytest.param(2, ["zero.stage=2"], id="zero2"),
        pytest.param(2, ["zero.stage=3"], id="zero3"),
        pytest.param(1, ["zero.offload_optimizer=cpu"], id="host"),
    ],
)
def test_a_spike_changes_neither_weights_nor_moments(
    byte_dataset: str, tmp_path: Path, ranks: int, layout: list[str]
) -> None:
    plant = partial(second_step_stands_out, tmp_path / "hashes")
    assert (
        pretrain(ranks, words(byte_dataset, tmp_path / "run", "train.steps=4", *layout), plant=plant)
        == [(0, "")] * ranks
    )
    assert [(skip["step"], skip["reason"]) for skip in events(tmp_path / "run", "skip")] == [(2, "gradient")]
    for rank in range(ranks):
        hashes = (tmp_path / f"hashes.{rank}").read_text().split()
        assert [before != after for before, after in pairwise(hashes)] == [True, False, True, True]


def second_step_stands_out(hashes: Path) -> None:
    """Each rank writes down its state before the first step and after each."""
    import megallama.train.loop
    import megallama.train.spikes

    train: Any = megallama.train.loop
    spikes: Any = megallama.train.spikes.Spikes
    original, judge, seen = train.train_step, spikes.judge, list[str]()

    def hashed(run: Any) -> str:
        tensors = [t for part in run.engine.fragments() for t in (part.master, *part.moments.values())]
        steps = [state["step"] for state in run.engine._optimizer.state.values()]
        weights = [weight.detach().float() for weight in run.model.parameters()]
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in (*tensors, *steps, *weights))).hexdigest()

    def watched(run: Any, *rest: Any) -> Any:
        seen[:] = seen or [hashed(run)]
        result = original(run, *rest)
        seen.append(hashed(run))
        hashes.with_suffix(f".{run.mesh.rank}").write_text("\n".join(seen))
        return result

    def judged(self: Any, loss: Any, norm: Any) -> Any:
        return judge(self, loss, norm) | torch.tensor([False, len(seen) == 2])

    train.train_step, spikes.judge = watched, judged


def test_a_batch_that_does_not_go_with_the_ranks_is_not_gone_back_to(byte_dataset: str, tmp_path: Path) -> None:
    run, ramp = tmp_path / "run", f"train.batch_ramp=[{{global_batch_size: 2, until: {20 * 2 * 32}}}]"
    length = ["train.steps=null", f"train.tokens={(20 * 2 + 20 * 4) * 32}", "checkpoint.every=15"]
    start = words(byte_dataset, run, ramp, *length)
    assert pretrain(1, [*start, "train.stop_after=22"]) == [(0, "")]
    saved = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert saved == ["step_00000015", "step_00000022"]
    assert pretrain(2, start, plant=all_stand_out) == [(1, "")] * 2
    assert events(run, "rewind") == []
    assert json.loads((run / "outcome.json").read_text())["reason"].startswith("2 steps in a row were skipped")
    assert {path.name for path in (run / "checkpoints").glob("step_*")} >= set(saved)


def test_the_norms_of_a_diagnosis_do_not_depend_on_the_layout(byte_dataset: str, tmp_path: Path) -> None:
    pages = []
    for ranks in (1, 2):
        run = tmp_path / str(ranks)
        assert pretrain(ranks, words(byte_dataset, run), plant=all_stand_out) == [(1, "")] * ranks
        page = (run / "diagnosis.txt").read_text()
        pages.append(
            [float(each) for pair in re.findall(r"^layer \d+: (\S+), (\S+)$", page, re.MULTILINE) for each in pair]
        )
    assert pages[0] == pytest.approx(pages[1], rel=1e-2) and len(pages[0]) > 2


def all_stand_out() -> None:
    from megallama.train.spikes import Spikes

    def judge(self: Spikes, loss: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return torch.tensor([True, False])

    spikes: Any = Spikes
    spikes.judge = judge


def test_saves_amid_skipped_steps_replace_none_of_before(byte_dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    start = words(byte_dataset, run, "checkpoint.every=1", "checkpoint.keep=1", "train.max_skipped=3")
    assert pretrain(1, start, plant=partial(spoiled, BAD)) == [(0, "")]
    (rewind,) = events(run, "rewind")
    assert (rewind["step"], rewind["passed_over"]) == (33, [136, 148])
    assert final_loss(run) < 1.5


def test_a_rewind_goes_back_behind_the_update_that_ruined_the_weights(byte_dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(1, words(byte_dataset, run, "checkpoint.keep=1"), plant=ruined_at_35) == [(0, "")]
    assert [skip["step"] for skip in events(run, "skip")] == [36, 37]
    assert [rewind["step"] for rewind in events(run, "rewind")] == [30]
    assert final_loss(run) < 1.5


def ruined_at_35() -> None:
    """The update of the 35th step makes all weights twelve times as large, once."""
    import megallama.train.loop

    train: Any = megallama.train.loop
    original, seen = train.train_step, list[int]()

    def ruin(run: Any, *rest: Any) -> Any:
        result = original(run, *rest)
        seen.append(1)
        if len(seen) == 35:
            for fragment in run.engine.fragments():
                fragment.master.mul_(12)
            run.engine.state_was_loaded(35)
        return result

    train.train_step = ruin


def test_weights_that_are_thawed_have_norms_of_their_own(byte_dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    frozen = 'train.freeze=["model.embed_tokens.weight", "model.layers.0.*", "lm_head.weight"]'
    more = ["train.steps=30", "health.spike_deviations=6", "checkpoint.every=0"]
    assert pretrain(1, words(byte_dataset, run, *more, frozen, "train.stop_after=20")) == [(0, "")]
    assert pretrain(1, words(byte_dataset, run, *more)) == [(0, "")]
    norms = [event["grad_norm"] for event in events(run, "train")]
    assert min(norms[20:23]) > 1.5 * max(norms[15:20])
    assert events(run, "skip") == []


def test_gradients_with_another_z_loss_have_norms_of_their_own(byte_dataset: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ["train.steps=24", "health.spike_deviations=6", "checkpoint.every=0"]
    assert pretrain(1, words(byte_dataset, run, *more, "train.stop_after=20")) == [(0, "")]
    assert pretrain(1, words(byte_dataset, run, *more, "optimizer.z_loss=1")) == [(0, "")]
    norms = [event["grad_norm"] for event in events(run, "train")]
    assert min(norms[20:23]) > 1.5 * max(norms[15:20])
    assert events(run, "skip") == []
