"""The picture of a plan: its bars are the ledger's rows, its line the memory of a device, its files pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.image import imread
from typer.testing import CliRunner

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu, find_gpu
from megallama.plan.cli import plan
from megallama.plan.memory.ledger import memory_rows
from megallama.plan.report.plot import COMPONENTS, check_target, draw_plan

CONFIG = Path(__file__).parents[2] / "configs" / "8b.yaml"
PIPELINE = ["parallel.pipeline=4", "parallel.tensor=1", "train.global_batch_size=128"]
app = typer.Typer()
app.command()(plan)


@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev", "zbvzerobubble"])
def test_bars_are_the_rows_of_the_ledger(schedule: str) -> None:
    config = load_config(CONFIG, [*PIPELINE, f"parallel.schedule={schedule}"])
    axes = draw_plan(config, 64).axes[0]
    bars = {bar.get_label(): bar.patches for bar in axes.containers if isinstance(bar, BarContainer)}
    for rank, rows in enumerate(memory_rows(config, 16)):
        drawn = {name: patches[rank].get_height() * 2**30 for name, patches in bars.items()}
        assert {name: size for name, size in drawn.items() if size} == {row.name: row.size for row in rows if row.size}
        tops = [patches[rank].get_y() + patches[rank].get_height() for patches in bars.values()]
        assert max(tops) * 2**30 == pytest.approx(sum(row.size for row in rows))
    assert {len(patches) for patches in bars.values()} == {4}
    colours = [patches[0].get_facecolor() for patches in bars.values()]
    assert len(set(colours)) == len(colours), "a colour stands for one row"


OTHERS = {
    "a schedule that splits backwards": ["parallel.schedule=zbvzerobubble"],
    "fp32": ["train.dtype=fp32"],
    "no pipeline, ZeRO-3": ["parallel.pipeline=1", "zero.stage=3"],
    "everything recomputed": ["train.recompute=full"],
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_component_has_one_colour_in_every_picture(other: str) -> None:
    def colours(*words: str) -> dict[str, object]:
        axes = draw_plan(load_config(CONFIG, [*PIPELINE, *words]), 64).axes[0]
        bars = [bar for bar in axes.containers if isinstance(bar, BarContainer)]
        return {str(bar.get_label()): bar.patches[0].get_facecolor() for bar in bars}

    plain, changed = colours(), colours(*OTHERS[other])
    shared = plain.keys() & changed.keys()
    assert len(shared) >= 4
    assert {name: changed[name] for name in shared} == {name: plain[name] for name in shared}
    assert not {changed[name] for name in changed.keys() - shared} & {plain[name] for name in shared}


@pytest.mark.parametrize("other", OTHERS)
def test_every_row_of_the_ledger_has_a_place_among_the_components(other: str) -> None:
    config = load_config(CONFIG, [*PIPELINE, *OTHERS[other]])
    keys = [row.key for rows in memory_rows(config, 16) for row in rows]
    assert set(keys) <= set(COMPONENTS)


def test_the_picture_is_of_memory_alone() -> None:
    assert len(draw_plan(load_config(CONFIG, PIPELINE), 64).axes) == 1


@pytest.mark.parametrize(
    ("words", "gpu", "label", "fits"),
    [
        ([], "h100", "77.6 GiB of NVIDIA H100 SXM", True),
        (["train.micro_batch_size=2", "train.recompute=none"], "a100-40g", "38.8 GiB of NVIDIA A100 SXM 40 GB", False),
    ],
)
def test_a_line_stands_where_the_memory_of_the_device_ends_and_the_picture_holds_it(
    words: list[str], gpu: str, label: str, fits: bool
) -> None:
    config, device = load_config(CONFIG, [*PIPELINE, *words]), find_gpu(gpu)
    axes = draw_plan(config, 64, device).axes[0]
    (line,) = axes.lines
    (height,) = set(line.get_ydata())
    assert height == pytest.approx(device.usable_bytes / 2**30)
    assert line.get_label() == label
    fullest = max(sum(row.size for row in rows) for rows in memory_rows(config, 16)) / 2**30
    assert (fullest <= height) == fits
    assert axes.get_ylim()[1] > max(height, fullest)
    assert not draw_plan(config, 64).axes[0].lines


def test_the_command_draws_the_memory_of_the_device_that_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str | None] = []

    def draw(config: RunConfig, world_size: int, gpu: Gpu | None = None) -> Figure:
        drawn.append(gpu and gpu.key)
        return draw_plan(config, world_size, gpu)

    monkeypatch.setattr("megallama.plan.report.plot.draw_plan", draw)
    run = [str(CONFIG), *PIPELINE, "--gpus", "64", "--plot"]
    for words in ([str(tmp_path / "without.png")], [str(tmp_path / "with.png"), "--gpu", "h100"]):
        assert CliRunner().invoke(app, [*run, *words]).exit_code == 0
    assert drawn == [None, "h100-80g"]
    result = CliRunner().invoke(app, [*run, str(tmp_path / "cpu.png"), "--gpu", "cpu"])
    assert str(result.exception).startswith("cpu.memory_gib is not known")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["with.png", "without.png"]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_the_command_writes_a_picture(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"out{suffix}"
    result = CliRunner().invoke(app, [str(CONFIG), *PIPELINE, "--gpus", "64", "--plot", str(path)])
    assert (result.exit_code, result.stdout) == (0, f"the memory of each pipeline rank is in {path}\n")
    if suffix == ".png":
        height, width, _ = imread(path).shape
        assert width > 1000 and height > 500
        assert imread(path)[..., :3].std() > 0.1, "it is not blank"
    elif suffix == ".svg":
        assert re.search(r'<svg [^>]*viewBox="0 0 [\d.]+ [\d.]+"', path.read_text())
    else:
        assert path.read_bytes().startswith(b"%PDF-")


def test_files_that_take_no_picture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--plot=out\.jpg is no picture; end it in \.png, \.svg or \.pdf$"):
        check_target(Path("out.jpg"))
    with pytest.raises(UserError, match=r"none/out\.png cannot be written \(No such file or directory\); give a path"):
        check_target(tmp_path / "none" / "out.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=r"^--plot=.*folder\.png is a folder; give the name of a file, as out\.png$"):
        check_target(tmp_path / "folder.png")
    (tmp_path / "mine.png").write_text("mine")
    with pytest.raises(UserError, match=r"mine\.png exists, and is not written over; give another name, or remove it$"):
        check_target(tmp_path / "mine.png")
    assert (tmp_path / "mine.png").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--plot", "out.png"], "--plot=out.png needs a CONFIG such as configs/7b.yaml; give one"),
        ([str(CONFIG), "--plot", "out.png", "--json"], "--plot=out.png does not go with --json; leave one of them out"),
        (
            [str(CONFIG), "--timeline", "--plot", "o.png"],
            "--timeline does not go with --plot=o.png; leave one of them out",
        ),
    ],
)
def test_options_that_contradict_it_are_refused(arguments: list[str], sentence: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == sentence
