"""`megallama plan --search`: what it prints, what it writes, and what it refuses before it begins."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from megallama.errors import UserError
from megallama.hardware.gpus import find_gpu
from megallama.system.new_file import write_new_files
from tests.plan.test_plan_command import CONFIGS, app, planned

SEARCH = ["--search", "--gpus", "8", "--gpu", "h100"]


def searched(*words: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, [*words, "--json"])
    assert result.exit_code == 0, result.exception
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def as_overrides(layout: dict[str, Any]) -> list[str]:
    """The words that make a run of a layout."""
    return [
        f"parallel.tensor={layout['tp']}",
        f"parallel.pipeline={layout['pp']}",
        f"parallel.schedule={layout['schedule']}",
        f"parallel.chunks={max(2, layout['chunks'])}",
        f"zero.stage={layout['zero_stage']}",
        f"train.micro_batch_size={layout['micro_batch_size']}",
        f"train.recompute={layout['recompute']}",
    ]


BESIDE = {
    "nothing": "",
    "tokens and a price": "--tokens 1T --price 2",
    "other software": "--software megatron-2024",
    "an assumed MFU": "--mfu 0.35 --price 2",
}


@pytest.mark.parametrize("beside", BESIDE)
def test_each_layout_costs_what_its_own_plan_says(beside: str) -> None:
    run = [str(CONFIGS / "1b.yaml"), "--gpus", "16", "--gpu", "h100", *BESIDE[beside].split()]
    found = searched(*run, "--search")["layouts"]
    for layout in (found["rank_1"], found["rank_10"]):
        plan = planned(*run, *as_overrides(layout))
        cost = plan["cost"]
        assert layout["seconds"] == plan["step_time"]["total"]
        assert layout["bytes"] == plan["memory"]["total"]
        assert layout["mfu"] == plan["speed"]["mfu_full"]
        assert (layout["days"], layout["gpu_hours"]) == (cost["days"], cost["gpu_hours"])
        assert layout.get("money") == cost.get("money")
        assert ("money" in layout) == ("--price" in run)


def test_a_gpu_without_a_constant_is_searched_at_an_assumed_mfu_for_what_fits() -> None:
    run = [str(CONFIGS / "1b.yaml"), "--gpus", "16", "--gpu", "mi300x", "--search"]
    assert str(CliRunner().invoke(app, run).exception).startswith("mi300x.efficiency is not known; assume a speed by ")
    found = searched(*run, "--mfu", "0.4")
    assert found["ties"] == found["fits"] > 10
    assert found["layouts"]["rank_1"]["bytes"] <= found["usable_bytes"] == find_gpu("mi300x").usable_bytes
    assert [layout["mfu"] for layout in found["layouts"].values()] == pytest.approx([40] * 10)


def test_an_assumed_mfu_is_not_blamed_on_the_batch() -> None:
    """A low one is an assumption of the caller; no other batch would change it."""
    run = [str(CONFIGS / "1b.yaml"), *SEARCH, "--mfu", "0.1"]
    assert "take a larger batch" not in " ".join(CliRunner().invoke(app, run).stdout.split())


def test_a_reason_is_one_line_and_its_places_follow_where_they_are_asked_for() -> None:
    run = [str(CONFIGS / "70b.yaml"), "train.global_batch_size=24", "--search", "--gpus", "64", "--gpu", "h100"]
    rejected = searched(*run)["rejected"].values()
    for words, explained in ([], False), (["--explain"], True):
        printed = CliRunner().invoke(app, [*run, *words], env={"COLUMNS": "4000"}).stdout
        lines = printed.partition("\nRejected: ")[2].splitlines()
        for one, line in zip(rejected, lines[2:], strict=False):
            assert line.startswith(one["reason"])
            assert line.split()[-1] == f"{one['layouts']:,}"
            assert all((f"{where}: {count:,}" in line) == explained for where, count in one["places"].items())
        assert ("--explain: where they are." in lines) != explained
        assert len([line for line in lines if line]) == 2 + len(rejected) + (not explained)


def test_the_fastest_layout_is_written_as_a_config_and_a_job_that_stand(tmp_path: Path) -> None:
    config, job = tmp_path / "run.yaml", tmp_path / "run.sh"
    words = [str(CONFIGS / "1b.yaml"), "--search", "--gpus", "16", "--gpu", "h100", "--json"]
    result = CliRunner().invoke(app, [*words, "--write", str(config), "--sbatch", str(job)])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert len(found["layouts"]) == 10
    written = planned(str(config), "--gpus", "16", "--gpu", "h100")
    first, speed = found["layouts"]["rank_1"], written["speed"]
    assert written["step_time"]["total"] == first["seconds"]
    assert written["memory"]["total"] == first["bytes"]
    assert speed["tokens_per_second_per_gpu"] == first["tokens_per_second_per_gpu"]
    assert speed["mfu_full"] == first["mfu"]
    assert first["tp"] * first["pp"] * first["dp"] == 16
    assert {"zero_stage", "schedule", "chunks", "micro_batch_size", "recompute"} < set(first)
    assert found["tried"] == found["fits"] + sum(one["layouts"] for one in found["rejected"].values())
    assert {"reason", "places", "layouts"} == set(found["rejected"]["class_1"])
    assert first["gpu_hours"] == pytest.approx(written["cost"]["gpu_hours"])
    assert "#SBATCH --nodes=2\n" in job.read_text()
    assert f'slurm/run.sh" {config}' in job.read_text()
    again = CliRunner().invoke(app, [*words, "--write", str(config)])
    assert str(again.exception) == f"{config} exists, and is not written over; give another name, or remove it"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--write", "both", "--sbatch", "./both"], "--sbatch=both is the file of --write as well; give another name"),
        (["--write", ""], "--write=. is a folder; give the name of a file, as run.yaml"),
        (["--write", "new.yaml", "--sbatch", "old.sh"], "old.sh exists, and is not written over; give another name"),
        (["--write", "new.yaml", "--sbatch", "no/a.sh"], "no/a.sh cannot be written (No such file or directory); give"),
        (["--write", "n" * 300], f"{'n' * 300} cannot be written (File name too long); give a path in a folder"),
        (["train.dtype=fp32", "--write", "new.yaml"], "train.dtype=fp32 has no step time on h100-80g, whose peak is"),
        (["--software", "megatorn"], "--software=megatorn is not known; did you mean megatron-2024?"),
        (["--mfu", "40"], "--mfu=40 is not a number from 0.01 to 1; did you mean 0.4?"),
        (["--price", "-2"], "--price=-2 is not a number from 0 to 1e9; did you mean 2?"),
        (["--tokens", "many"], "--tokens=many is not a number from 1 to 1e30; write it as 2e12 or 2T"),
    ],
)
def test_what_a_search_cannot_write_or_price_is_said_before_it_begins(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("megallama.plan.search.search.search", lambda *_: pytest.fail("it searched"))
    Path("old.sh").write_text("mine")
    result = CliRunner().invoke(app, [str(CONFIGS / "1b.yaml"), *SEARCH, *words])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(sentence)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old.sh", "mine")]


def test_files_are_written_together_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no/run\.sh cannot be written \(No such file or directory\); give a path"):
        write_new_files({tmp_path / "run.yaml": b"a", tmp_path / "no" / "run.sh": b"b"})
    assert list(tmp_path.iterdir()) == []
