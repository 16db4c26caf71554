"""Whatever is wrong with a checkpoint is found and named, in its files and in what they say."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from megallama.checkpoint.commands import listing
from megallama.checkpoint.commands.listing import COMPLETE, checkpoints_at, checkpoints_folder, entries, layout_name
from megallama.checkpoint.format import (
    BEST,
    LATEST,
    MANIFEST,
    STATE,
    TENSORS,
    File,
    Manifest,
    TornCheckpointError,
    read_document,
    read_manifest,
    write_manifest,
)
from megallama.checkpoint.reading.inspect import inspect
from megallama.checkpoint.state import read_saved
from megallama.checkpoint.tensors import Stored, read_places
from megallama.errors import UserError
from tests.checkpoint.damaging import (
    CHECKPOINT,
    EMBEDDING,
    Harm,
    bomb,
    copy_as,
    edit,
    edit_manifest,
    flip,
    put,
    rewrite,
    truncate,
)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return shutil.copytree(CHECKPOINT, tmp_path / "checkpoints" / CHECKPOINT.name)


def embedding(change: Callable[[dict[str, Any]], object]) -> Harm:
    """Change what tensors.json says of the embedding, a matrix in two chunks: rows 0 ... 255, and row 256."""
    return lambda path: edit(path / TENSORS, lambda content: change(content["tensors"][EMBEDDING]))


def second_chunk(**values: object) -> Harm:
    return embedding(lambda tensor: tensor["chunks"][1].update(values))


def model(**values: object) -> Harm:
    return lambda path: edit(path / STATE, lambda content: content["model"].update(values))


def change_manifest(change: Callable[[dict[str, File]], object]) -> Harm:
    """Change the files that the manifest names, in place, and its own hash."""

    def harm(path: Path) -> None:
        manifest = read_manifest(path)
        files = dict(manifest.files)
        change(files)
        write_manifest(path, Manifest(manifest.step, manifest.saved, manifest.versions, files))

    return harm


def outside(files: dict[str, File]) -> None:
    files["../outside.bin"] = files["rank_00000.bin"]


FILES: dict[str, tuple[Harm, str]] = {
    "truncated file": (lambda path: truncate(path / "rank_00002.bin"), r"rank_00002.bin has \d+ bytes, not \d+"),
    "flipped bit": (lambda path: flip(path / "rank_00001.bin"), r"rank_00001.bin is damaged"),
    "flipped bit of names": (lambda path: flip(path / TENSORS), r"tensors.json is damaged"),
    "flipped bit of the state": (lambda path: flip(path / STATE), r"state.json is damaged"),
    "missing file": (lambda path: (path / "rank_00003.bin").unlink(), r"rank_00003.bin is missing"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), r"it has no manifest.json"),
    "empty manifest": (lambda path: (path / MANIFEST).write_bytes(b""), r"manifest.json is damaged"),
    "no JSON in the manifest": (lambda path: (path / MANIFEST).write_text("step 3"), r"manifest.json is damaged"),
    "a list for a manifest": (lambda path: (path / MANIFEST).write_text("[1]"), r"manifest.json is damaged"),
    "other step in the manifest": (
        lambda path: edit_manifest(path, lambda tree: tree["content"].update(step=4)),
        r"manifest.json is damaged",
    ),
    "format 0": (lambda path: edit_manifest(path, lambda tree: tree.update(format=0)), r"manifest.json is damaged"),
    "format in words": (
        lambda path: edit_manifest(path, lambda tree: tree.update(format="2")),
        r"manifest.json is damaged",
    ),
    "a folder for a manifest": (
        lambda path: ((path / MANIFEST).unlink(), (path / MANIFEST).mkdir()),
        r"manifest.json cannot be read: Is a directory",
    ),
    "no state in the manifest": (change_manifest(lambda files: files.pop(STATE)), r"manifest.json names no state.json"),
    "a file above, in the manifest": (
        change_manifest(outside),
        r"manifest.json names the file '../outside.bin' outside the folder",
    ),
    "pickle for numbers": (lambda path: bomb(path / "rank_00000.bin"), r"rank_00000.bin is damaged"),
    "pickle for names": (lambda path: bomb(path / TENSORS), r"tensors.json is damaged"),
    "pickle for a state": (lambda path: bomb(path / STATE), r"state.json is damaged"),
    "pickle for a manifest": (lambda path: bomb(path / MANIFEST), r"manifest.json is damaged"),
}

PLACES: dict[str, tuple[Harm, str]] = {
    "hole": (
        embedding(lambda tensor: tensor["chunks"].pop()),
        r"tensors.json has element \[256, 0\] of model.embed_tokens.weight in no chunk",
    ),
    "hole inside a row": (second_chunk(shape=[1, 7]), r"element \[256, 7\] of model.embed_tokens.weight in no chunk"),
    "overlap": (second_chunk(offset=[255, 0]), r"element \[255, 0\] of model.embed_tokens.weight in 2 chunks"),
    "the same chunk twice": (
        embedding(lambda tensor: tensor["chunks"].append(tensor["chunks"][0])),
        r"element \[0, 0\] of model.embed_tokens.weight in 2 chunks",
    ),
    "no chunk": (embedding(lambda tensor: tensor["chunks"].clear()), r"element \[0, 0\] .* in no chunk"),
    "chunk outside": (
        second_chunk(offset=[257, 0]),
        r"of model.embed_tokens.weight outside of it: \[1, 8\] from \[257, 0\] on, and the tensor is \[257, 8\]",
    ),
    "chunk of another rank": (second_chunk(offset=[256], shape=[8]), r"a chunk of model.embed_tokens.weight outside"),
    "chunk beyond the file": (
        second_chunk(start=1 << 20),
        r"a chunk of model.embed_tokens.weight beyond the end of rank_00001.bin",
    ),
    "before the file": (second_chunk(start=-4), r"malformed: .*start is -4"),
    "between numbers": (second_chunk(start=2), r"malformed: .*start is 2"),
    "before the tensor": (second_chunk(offset=[-1, 0]), r"malformed: .*offset.0 is -1"),
    "an empty chunk": (second_chunk(shape=[0, 8]), r"malformed: .*shape.0 is 0"),
    "a fraction": (second_chunk(shape=[1.5, 8]), r"malformed: .*shape.0 is 1.5"),
    "no file": (embedding(lambda tensor: tensor["chunks"][1].pop("file")), r"malformed: .*Field required"),
    "a file above": (
        second_chunk(file="../outside.bin"),
        r"names the file '../outside.bin', which is not in the manifest",
    ),
    "a file elsewhere": (second_chunk(file="/etc/passwd"), r"names the file '/etc/passwd', which is not in"),
    "other numbers": (
        lambda path: edit(path / TENSORS, lambda content: content.update(dtype="bfloat16")),
        r"malformed: dtype is 'bfloat16'",
    ),
    "no JSON": (lambda path: rewrite(path / TENSORS, b"tensors"), r"malformed: Invalid JSON"),
}

CONTENT: dict[str, tuple[Harm, str]] = {
    "NaN": (put(float("nan")), r"model.embed_tokens.weight is not finite in 1 of 2056 elements"),
    "infinity": (put(float("-inf")), r"model.embed_tokens.weight is not finite in 1 of 2056 elements"),
    "missing moment": (
        lambda path: edit(path / TENSORS, lambda content: content["tensors"].pop("optimizer.exp_avg.lm_head.weight")),
        r"optimizer.exp_avg.lm_head.weight is missing",
    ),
    "moments of what was frozen": (
        lambda path: edit(path / STATE, lambda content: content.update(freeze=["lm_head.weight"])),
        r"optimizer.exp_avg.lm_head.weight and 1 more tensors are not of the model",
    ),
    "frozen in another model": (
        lambda path: edit(path / STATE, lambda content: content.update(freeze=["transformer.*"])),
        r"state.json: train.freeze names 'transformer.\*', which matches no weight",
    ),
    "missing layer": (
        model(num_hidden_layers=4),
        r"model.layers.3.input_layernorm.weight and 26 more tensors are missing",
    ),
    "more than the model": (
        model(tie_word_embeddings=True),
        r"lm_head.weight and 2 more tensors are not of the model",
    ),
    "another shape": (
        model(vocab_size=256),
        r"model.embed_tokens.weight has the shape \[257, 8\], and in the model \[256, 8\]",
    ),
    "no model": (
        lambda path: edit(path / STATE, lambda content: content.pop("model")),
        r"state.json is malformed: model is .*Field required",
    ),
    "another step": (
        lambda path: edit(path / STATE, lambda content: content["state"].update(step=4)),
        r"state.json says step 4, and the manifest 3",
    ),
    "no JSON in the state": (lambda path: rewrite(path / STATE, b"{"), r"state.json is malformed: Invalid JSON"),
}

ALL = FILES | PLACES | CONTENT


def test_a_sound_checkpoint_has_nothing_wrong_and_every_file_and_tensor_is_read(checkpoint: Path) -> None:
    read: list[str] = []
    assert inspect(checkpoint, read.append) == []
    assert len(read) == 6 + 6  # each file against its hash, then its numbers


def test_a_state_may_name_all_that_a_configuration_has_room_for(checkpoint: Path) -> None:
    """120 stages of a thousand sources each, and norms as large as those of gradients in fp32 can be."""
    weights = {f"source-{number:04d}": 1.0 for number in range(1000)}
    mixture = [{"from_step": step, "weights": weights} for step in range(120)]

    def grow(content: dict[str, Any]) -> None:
        content["data"]["mixture"] = mixture
        content["state"] |= {"losses": [1.0], "norms": [1e40]}

    edit(checkpoint / STATE, grow)
    assert (checkpoint / STATE).stat().st_size > 2 << 20
    assert inspect(checkpoint) == []
    saved = read_saved(checkpoint)
    assert (len(saved.data.mixture), saved.state.norms) == (120, (1e40,))


@pytest.mark.parametrize("name", ALL)
def test_what_is_wrong_is_named(name: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkpoint.parent)
    harm, reason = ALL[name]
    harm(checkpoint)
    reasons = inspect(checkpoint)
    assert re.search(reason, reasons[0])
    assert len(reasons) == 1 or name == "another shape"
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", PLACES)
def test_what_names_wrong_places_is_not_read_from(name: str, checkpoint: Path) -> None:
    harm, reason = PLACES[name]
    harm(checkpoint)
    with pytest.raises(TornCheckpointError, match=reason):
        Stored(checkpoint)


def test_exact_covers_are_told_from_others(checkpoint: Path) -> None:
    """Of 300 random sets of rectangles, against counting each element; about half of them are exact."""
    random = Random(0)
    exact = 0
    for _ in range(300):
        shape, boxes = random_boxes(random)
        times = np.zeros(shape, dtype=np.int64)
        for offset, extent in boxes:
            times[tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))] += 1
        starts = np.cumsum([0, *(4 * math.prod(n) for _, n in boxes)]).tolist()
        places = zip(boxes, starts[:-1], strict=True)
        chunks = [{"offset": o, "shape": n, "file": "rank_00000.bin", "start": start} for (o, n), start in places]
        content = {"dtype": "float32", "tensors": {"x": {"shape": shape, "chunks": chunks}}}
        (checkpoint / TENSORS).write_text(json.dumps(content))
        if (times == 1).all():
            assert read_places(checkpoint, read_manifest(CHECKPOINT).files)["x"].shape == tuple(shape)
            exact += 1
            continue
        with pytest.raises(TornCheckpointError, match="of x in") as refused:
            read_places(checkpoint, read_manifest(CHECKPOINT).files)
        match = re.search(r"element \[(.*)\] of x in (no|\d+) chunk", str(refused.value))
        assert match is not None
        element = tuple(map(int, match[1].split(", ")))
        assert times[element] == int(match[2].replace("no", "0"))
    assert 75 < exact < 225


def random_boxes(random: Random) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """A shape, and rectangles (offset, extent) that cover it, of which sometimes one is lost, there twice, or moved."""
    shape = [random.randint(1, 4) for _ in range(random.choice((1, 2, 3)))]
    boxes = [([0] * len(shape), shape)]
    for _ in range(4):
        (offset, extent), dim = boxes.pop(random.randrange(len(boxes))), random.randrange(len(shape))
        cut = random.randint(0, extent[dim])
        for begin, size in ((0, cut), (cut, extent[dim] - cut)):
            if size:
                moved = [*offset[:dim], offset[dim] + begin, *offset[dim + 1 :]]
                boxes.append((moved, [*extent[:dim], size, *extent[dim + 1 :]]))
    match random.choice(("leave", "leave", "leave", "lose", "repeat", "move")):
        case "lose":
            boxes.pop()
        case "repeat":
            boxes.append(boxes[0])
        case "move":
            begin = [random.randrange(size) for size in shape]
            boxes[0] = (begin, [random.randint(1, size - first) for size, first in zip(shape, begin, strict=True)])
    return shape, boxes


def test_a_newer_format_is_refused_by_one_sentence(checkpoint: Path) -> None:
    edit_manifest(checkpoint, lambda tree: tree.update(format=2, content="another way to say it", sha256="?"))
    sentence = f"{checkpoint} is a checkpoint of format 2, and this megallama reads up to 1; use a newer megallama"
    for read in (inspect, read_manifest, Stored):
        with pytest.raises(UserError) as refused:
            read(checkpoint)
        assert str(refused.value) == sentence


def test_a_list_tells_whole_checkpoints_from_what_is_left_of_others(checkpoint: Path) -> None:
    folder = checkpoint.parent
    names = {
        "step_00000003": COMPLETE,
        "step_00000003.torn-1": "set aside",
        "step_00000004": "torn: rank_00000.bin is missing",
        "step_00000005": "of a newer format",
        "step_00000006.dropped": "half deleted",
        "step_00000007.partial-0123abcd": "unfinished",
        "step_123456789": COMPLETE,
    }
    for step in (4, 123456789):
        copy_as(checkpoint, step)
    for name in names:
        if not (folder / name).exists():
            shutil.copytree(CHECKPOINT, folder / name)
    for name in ("step_00000004", "step_00000007.partial-0123abcd"):
        (folder / name / "rank_00000.bin").unlink()
    (folder / "step_00000004" / STATE).write_text("{}".ljust((checkpoint / STATE).stat().st_size))
    edit_manifest(folder / "step_00000005", lambda tree: tree.update(format=2))
    (folder / "notes").mkdir()
    (folder / LATEST).write_text("step_123456789")
    (folder / BEST).write_text("step_00000003")

    found = entries(folder)
    assert [entry.step for entry in found] == [123456789, 7, 6, 5, 4, 3, 3]
    assert {entry.path.name: entry.condition for entry in found} == names
    assert {entry.path.name: entry.marks for entry in found if entry.marks} == {
        "step_123456789": ("latest",),
        "step_00000003": ("best",),
    }
    torn, whole = found[4:6]
    state, manifest = read_document(CHECKPOINT), read_manifest(CHECKPOINT)
    assert (whole.loss, whole.validation_loss) == (state["loss"], state["state"]["validation_loss"])
    assert (whole.layout, whole.saved) == ("tp2-dp2-zero1, fp32", manifest.saved)
    assert whole.bytes == manifest.bytes + (CHECKPOINT / MANIFEST).stat().st_size
    assert (torn.loss, torn.layout, torn.saved) == (None, None, None)
    assert torn.bytes == whole.bytes - manifest.files["rank_00000.bin"].bytes


def test_a_folder_that_goes_while_it_is_listed_is_left_out(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unfinished = shutil.copytree(checkpoint, checkpoint.with_name("step_00000004.partial-0123abcd"))

    def rename_one(path: Path) -> Manifest:
        if path == unfinished:
            unfinished.rename(checkpoint.with_name("step_00000004"))
        return read_manifest(path)

    monkeypatch.setattr(listing, "read_manifest", rename_one)
    assert checkpoint in [entry.path for entry in entries(checkpoint.parent)]
    assert not unfinished.exists()


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (
            {"tensor": 2, "pipeline": 4, "schedule": "dualpipev", "data": 8, "zero_stage": 1},
            "tp2-pp4-dualpipev-dp8-zero1",
        ),
        ({"tensor": 1, "pipeline": 1, "schedule": "1f1b", "data": 1, "zero_stage": 3}, "zero3"),
        (
            {"tensor": 1, "pipeline": 1, "schedule": "1f1b", "data": 2, "zero_stage": 1}
            | {"context": 4, "context_mode": "ulysses"},
            "dp2-cp4-ulysses-zero1",
        ),
    ],
)
def test_a_layout_is_named_as_verify_names_it(layout: dict[str, object], name: str) -> None:
    assert layout_name({**layout, "dtype": "bf16"}) == f"{name}, bf16"


def test_checkpoints_are_found_by_run_by_folder_and_by_name(checkpoint: Path, tmp_path: Path) -> None:
    newer = copy_as(checkpoint, 12)
    aside = shutil.copytree(CHECKPOINT, checkpoint.with_name("step_00000012.torn-1"))
    assert checkpoints_folder(tmp_path) == checkpoints_folder(checkpoint.parent) == checkpoint.parent
    assert checkpoints_at(tmp_path) == checkpoints_at(checkpoint.parent) == [newer, checkpoint]
    assert checkpoints_at(aside) == [aside]
    renamed = checkpoint.rename(tmp_path / "mine")
    assert checkpoints_at(renamed) == [renamed]
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    for path, sentence in [
        (tmp_path / "nowhere", "nowhere is not a folder; give a run directory"),
        (tmp_path / "empty", "holds no checkpoint; train until the first save"),
        (tmp_path / "empty" / "checkpoints", "holds no checkpoint; give a run directory"),
    ]:
        with pytest.raises(UserError, match=sentence):
            checkpoints_at(path)
