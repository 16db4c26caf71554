"""Runs of a mixture: alike at every layout, exact after every start, and of one past, whatever is to come."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megallama.checkpoint.format import complete_checkpoints
from megallama.checkpoint.state import read_saved
from megallama.corpus.building.build import build_dataset
from tests.launching import arguments, events, losses, pretrain, tree
from tests.parallel.test_agreement import apart

TEXTS = {
    "web": [f"page {number} of the web says {number % 7} things. " * 2 for number in range(30)],
    "code": [f"def f{number}(x):\n    return x + {number}\n" * 2 for number in range(20)],
    "maths": [f"{number} * {number} = {number * number}; " * 4 for number in range(20)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of each of TEXTS; tests only read them."""
    folder = tmp_path_factory.mktemp("sources")
    for name, texts in TEXTS.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        build_dataset([str(folder / f"{name}.jsonl")], str(folder / name), "bytes", workers=1)
    return folder


def stages(folder: Path, *found: tuple[int, dict[str, float]]) -> str:
    """An override of data.mixture."""
    tree = [
        {
            "from_step": step,
            "sources": [{"path": str(folder / name), "weight": weight} for name, weight in weights.items()],
        }
        for step, weights in found
    ]
    return f"data.mixture={json.dumps(tree)}"


FIRST, LATER = (0, {"web": 0.7, "code": 0.3}), (3, {"code": 0.5, "maths": 0.5})


def words(folder: Path, run_dir: Path, *more: str) -> list[str]:
    run = arguments(
        "unused", run_dir, "data.path=null", "train.steps=6", "train.global_batch_size=8", "evaluation.every=3"
    )
    return [*run, stages(folder, FIRST, LATER), *more]


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """Six steps at dp 1, undisturbed; tests only read it."""
    assert pretrain(1, words(folder, folder / "run")) == [(0, "")]
    return folder / "run"


def test_two_ranks_train_and_evaluate_as_one(whole: Path, folder: Path, tmp_path: Path) -> None:
    assert pretrain(2, words(folder, tmp_path / "run")) == [(0, "")] * 2
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)
    one, two = events(whole, "eval"), events(tmp_path / "run", "eval")
    splits = ["train", "validation", "validation/web", "validation/code", "validation/maths"]
    assert [(e["step"], e["split"]) for e in one] == [(step, split) for step in (0, 3, 6) for split in splits]
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=1e-5)


def test_metrics_and_the_checkpoint_say_what_was_read(whole: Path) -> None:
    found = events(whole, "train")
    assert [e["source_tokens"] for e in found[1:4:2]] == [
        {"code": 5 * 32, "maths": 0, "web": 11 * 32},
        {"code": (7 + 4) * 32, "maths": 4 * 32, "web": 17 * 32},
    ]
    assert all(sum(e["source_tokens"].values()) == e["tokens"] for e in found)
    samples = {"web": 0.0, "code": 0.0, "maths": 0.0}
    for name, epochs in found[-1]["source_epochs"].items():
        samples[name] = found[-1]["source_tokens"][name] / 32 / epochs
    assert all(size == pytest.approx(round(size), rel=1e-5) for size in samples.values())
    newest = complete_checkpoints(whole / "checkpoints")[0]
    said = json.loads((newest / "state.json").read_text())
    begun = [{"from_step": step, "weights": weights} for step, weights in (FIRST, LATER)]
    assert (said["data"]["mixture"], said["state"]["stages"]) == (begun, [0, 24])


def test_a_run_goes_on_inside_a_stage_with_other_ranks_and_another_future(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    run = words(folder, tmp_path / "run")
    assert pretrain(2, [*run, "train.stop_after=2"]) == [(0, "")] * 2
    (saved,) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    assert [stage.weights for stage in read_saved(saved).data.mixture] == [FIRST[1]]
    assert read_saved(saved).state.stages == (0,)
    # What comes later may change: here it is written only now, as if the run had begun without it.
    assert pretrain(1, [*run, stages(folder, FIRST, (10**12, LATER[1])), "train.stop_after=3"]) == [(0, "")]
    assert pretrain(2, [*run, "train.stop_after=5"]) == [(0, "")] * 2
    assert pretrain(1, run) == [(0, "")]
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)


def test_a_run_of_one_dataset_goes_on_with_others(folder: Path, tmp_path: Path) -> None:
    begun, sources = words(folder, tmp_path / "begun"), stages(folder, (0, {"web": 1.0}), LATER)
    alone = ["data.mixture=null", f"data.path={folder / 'web'}", "train.stop_after=3"]
    assert pretrain(1, [*begun, *alone]) == [(0, "")]
    assert pretrain(1, [*begun, sources]) == [(0, "")]
    assert pretrain(1, [*words(folder, tmp_path / "planned"), sources]) == [(0, "")]
    assert losses(tmp_path / "begun") == losses(tmp_path / "planned")


def test_a_stage_begins_at_its_step_whatever_the_batches_were(folder: Path, tmp_path: Path) -> None:
    run = words(folder, tmp_path / "run", "checkpoint.keep=9")
    assert pretrain(1, [*run, "train.global_batch_size=4", "train.stop_after=2"]) == [(0, "")]
    assert pretrain(1, [*run, "train.stop_after=5"]) == [(0, "")]
    assert pretrain(1, [*run, "train.global_batch_size=2"]) == [(0, "")]
    found = [e["source_tokens"]["maths"] // 32 for e in events(tmp_path / "run", "train")]
    assert found == [0, 0, 0, 4, 8, 9]
    (newest, *_) = complete_checkpoints(tmp_path / "run" / "checkpoints")
    state = read_saved(newest).state
    assert (state.samples, state.stages) == (4 + 4 + 8 + 8 + 8 + 2, (0, 16))
    back = ["checkpoint.resume=2", "train.global_batch_size=16", "train.steps=4"]
    assert pretrain(1, [*run, *back]) == [(0, "")]
    found = [e["source_tokens"]["maths"] // 32 for e in events(tmp_path / "run", "train")[-2:]]
    assert found == [0, 8]


def test_a_run_whose_past_was_written_anew_is_refused(whole: Path, folder: Path) -> None:
    before = tree(whole)
    run = [*words(folder, whole), "train.steps=9"]
    for changed, sentence in (
        (
            [stages(folder, FIRST, (3, {"web": 0.5, "maths": 0.5}))],
            "data.mixture (code 0, web 0.5 from step 3) in the run; leave it as it was and change a stage from_step=6",
        ),
        ([stages(folder, FIRST, (2, LATER[1]))], "(code 0.5, maths 0.5 from step 2) in the run"),
        ([stages(folder, FIRST)], "no stage from_step=3 in the run"),
        (["data.mixture=null", f"data.path={folder / 'web'}"], "data.path in the run"),
        (
            [stages(folder, (0, {"web": 7, "code": 3}), LATER), "data.validation_fraction=0.3"],
            "the data of the run (the sources of data.mixture, data.pack, ",
        ),
    ):
        ((code, said),) = pretrain(1, [*run, *changed])
        assert (code, sentence in said) == (2, True), said
    assert tree(whole) == before


def test_a_limit_of_epochs_is_said_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    limited = stages(folder, FIRST).replace('"weight": 0.3', '"weight": 0.3, "epochs": 0.1')
    ((code, said),) = pretrain(1, [*words(folder, tmp_path / "run"), limited])
    assert (code, "more than its epochs=0.1; use weight=0.0303 at most" in said) == (2, True), said
    assert not (tmp_path / "run").exists()


@pytest.mark.layouts
def test_nodes_may_keep_their_copies_elsewhere_but_must_agree_on_weights(
    whole: Path, folder: Path, tmp_path: Path
) -> None:
    for name in TEXTS:
        for suffix in ("bin", "idx", "json"):
            (tmp_path / f"{name}.{suffix}").write_bytes((folder / f"{name}.{suffix}").read_bytes())
    run = words(folder, tmp_path / "run")
    assert apart(run, [stages(tmp_path, FIRST, LATER)]) == [(0, "")] * 2
    assert losses(tmp_path / "run") == pytest.approx(losses(whole), rel=1e-5)
    other = words(folder, tmp_path / "other")
    for code, said in apart(other, [stages(folder, (0, {"web": 0.6, "code": 0.4}), LATER)]):
        assert (code, "data.mixture is " in said) == (2, True), said
    assert not (tmp_path / "other").exists()


@pytest.mark.layouts
@pytest.mark.parametrize(
    "objective", [["train.objective=masked", "model.vocab_size=258"], ["data.pack=one", "data.document_mask=true"]]
)
def test_other_samples_are_read_through_a_mixture(objective: list[str], folder: Path, tmp_path: Path) -> None:
    found: list[Any] = []
    for ranks in (1, 2):
        run = words(folder, tmp_path / str(ranks), *objective, "train.steps=4", "evaluation.every=0")
        assert pretrain(ranks, run) == [(0, "")] * ranks
        found.append(losses(tmp_path / str(ranks)))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_what_is_passed_over_at_the_begin_of_a_stage_is_not_read_again(folder: Path, tmp_path: Path) -> None:
    more = ["train.steps=12", "train.max_skipped=2", "checkpoint.every=2", "checkpoint.keep=9"]
    run = arguments("unused", tmp_path / "run", "data.path=null", "train.global_batch_size=8", *more)
    later = (6, {"code": 0.5, "maths": 0.5})
    assert pretrain(1, [*run, stages(folder, FIRST, later)], plant=sevens_from_48_to_64) == [(0, "")]
    assert [skip["of_data"] for skip in events(tmp_path / "run", "skip")] == [[48, 56], [56, 64]]
    (rewind,) = events(tmp_path / "run", "rewind")
    assert (rewind["step"], rewind["passed_over"]) == (4, [48, 64])
    state = read_saved(tmp_path / "run" / "checkpoints" / "step_00000012").state
    assert (state.samples, state.updates, state.stages, state.passed_over) == (96, 12, (0, 48), ((48, 64),))


def sevens_from_48_to_64() -> None:
    """These samples, in the order of the data, are sevens, whose gradients are not finite."""
    import megallama.data.mixture
    import megallama.train.loop

    mixture: Any = megallama.data.mixture.Mixture
    train: Any = megallama.train.loop
    sample, train_step = mixture.sample, train.train_step

    def read(self: Any, number: int) -> Any:
        found = sample(self, number)
        return found * 0 + 7 if 48 <= number < 64 else found

    def step(run: Any, batches: Any, *rest: Any) -> Any:
        if not all((batch.tokens == 7).all() for batch in batches):
            return train_step(run, batches, *rest)
        handle = next(iter(run.model.parameters())).register_hook(lambda gradient: gradient * float("nan"))
        result = train_step(run, batches, *rest)
        handle.remove()
        return result

    mixture.sample, train.train_step = read, step
