"""`megallama report` as it is typed: what it writes, what it refuses, and names that would be something else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from megallama.cli import app
from megallama.errors import UserError
from megallama.report.cli import names_of
from megallama.run_dir.events import METRICS
from tests.launching import BIN, ROOT
from tests.report.written import Writer, long_run, plain_run

MOST_BYTES = 2_000_000


def report(*words: object) -> Any:
    """What `megallama report WORDS` prints, and its exit code; UserError passes."""
    return CliRunner().invoke(app, ["report", *map(str, words)], catch_exceptions=False)


class Parsed(HTMLParser):
    """The elements of a page, its text, and what lies in its script of data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self._within: tuple[str, str | None] = ("", None)
        self.data: dict[str, Any] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._within = tag, dict(attrs).get("type")

    def handle_data(self, data: str) -> None:
        if self._within == ("script", "application/json") and data.strip():
            self.data = json.loads(data)
        elif self._within[0] not in ("script", "style"):
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._within = ("", None)


def test_a_run_has_its_report_beside_its_metrics(tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run")
    done = report(run)
    assert done.output == f"the report is in {run}/report.html, a picture of it in {run}/report.png\n"
    page = Parsed((run / "report.html").read_text())
    assert {plot["key"] for plot in page.data["plots"]} == {curve["plot"] for curve in page.data["runs"][0]["curves"]}
    assert "train loss" in page.text
    height, width, _ = imread(run / "report.png").shape
    assert width > 1000 and height > 1000
    assert sorted(path.name for path in run.iterdir()) == [METRICS, "report.html", "report.png"]


def test_a_long_run_makes_a_page_that_can_be_sent(tmp_path: Path) -> None:
    run = long_run(tmp_path / "run", 10_000)
    report(run)
    assert (run / "report.html").stat().st_size < MOST_BYTES
    assert (run / "report.png").stat().st_size < MOST_BYTES
    page = Parsed((run / "report.html").read_text())
    loss = page.data["runs"][0]["curves"][0]
    train = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    told = {event["step"]: event["loss"] for event in train if event["event"] == "train"}
    assert len(loss["values"]) <= 2002
    for step, tokens, value in zip(loss["steps"], loss["tokens"], loss["values"], strict=True):
        assert value == float(f"{told[step]:.7g}")
        assert tokens == step * 1024
    assert max(loss["values"]) == float(f"{max(told.values()):.7g}")
    assert min(loss["values"]) == float(f"{min(told.values()):.7g}")


def test_many_runs_still_make_a_page_that_can_be_sent(tmp_path: Path) -> None:
    runs = [plain_run(tmp_path / f"run{n}", 2500) for n in range(6)]
    for some in (runs[:2], runs):
        report(*some, "--output", tmp_path)
        assert (tmp_path / "report.html").stat().st_size < MOST_BYTES


def test_a_page_names_nothing_outside_of_it(tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run")
    report(run)
    page = (run / "report.html").read_text()
    assert set(re.findall(r"\w+://[^\s\"'<>]+", page)) == {"http://www.w3.org/2000/svg"}  # the name of a language
    assert re.findall(r"(?:src|href)=[\"']?([^\"'\s>]+)", page) == ["data:,"]
    assert "default-src 'none'" in page


HOSTILE = [
    "</script><script>PWNED=1<!--",
    "<img src=x onerror=PWNED=1>",
    "a'b\"c&amp;d",
    "@@DATA@@",
    "$x$ \\frac{",
    "_hidden",
    "naïve 中文 🙂",
    "${PWNED}`",
]


def test_a_name_is_a_name(tmp_path: Path) -> None:
    report(plain_run(tmp_path / "plain", 3), "--output", tmp_path / "plain.html")
    # A folder's name has no slash; the name of a split is what the file says.
    names = [name.replace("/", "\u2215") for name in HOSTILE]
    runs = [plain_run(tmp_path / called, 3, [split]) for called, split in zip(names, HOSTILE, strict=True)]
    report(*runs, "--output", tmp_path / "report.html")
    page = Parsed((tmp_path / "report.html").read_text())
    assert [run["name"] for run in page.data["runs"]] == names
    for run, name, split in zip(page.data["runs"], names, HOSTILE, strict=True):
        assert split in [curve["name"] for curve in run["curves"]]
        assert page.text.count(name) >= 2, "in the title and the table"
    assert set(page.tags) == set(Parsed((tmp_path / "plain.html").read_text()).tags)
    assert imread(tmp_path / "report.png").shape[1] > 1000


def test_what_an_event_says_is_text(tmp_path: Path) -> None:
    run = Writer(tmp_path / "run", 3)
    run.train(1)
    run.write("checkpoint_failed", step=1, reason="</script><b>\x1b[2J", failures=1, seconds=1.0, blocked_seconds=0.0)
    run.write("stop", step=1, reason="</td><script>PWNED</script>", status="failed")
    report(tmp_path / "run")
    page = Parsed((tmp_path / "run" / "report.html").read_text())
    assert page.data["runs"][0]["marks"][0]["text"] == r"failed save, step 1: </script><b>\x1b[2J"
    assert "</td><script>PWNED</script>" in page.text
    assert page.tags.count("script") == 2


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run")
    report(run, "--output", tmp_path / "whole.html")
    with (run / METRICS).open("a") as file:
        file.write('{"event": "train", "step": 21, "lo')
    report(run, "--output", tmp_path / "torn.html")
    assert (tmp_path / "torn.html").read_text() == (tmp_path / "whole.html").read_text()


def test_runs_of_other_lengths_and_configs_are_drawn_with_one_warning(tmp_path: Path) -> None:
    runs = [plain_run(tmp_path / name, steps) for name, steps in (("a", 20), ("b", 7), ("c", 3))]
    (runs[0] / "config.yaml").write_text(
        "run: {dir: a}\noptimizer: {lr: 1e-3, clip: 1}\nmodel: {x: <b>}\ndata: {p: q}\n"
    )
    (runs[1] / "config.yaml").write_text(
        "run: {dir: b}\noptimizer: {lr: 2e-3, clip: 2}\nmodel: {x: y}\ntrain: {n: 1}\n"
    )
    (runs[2] / "config.yaml").write_text("{ no yaml")
    done = report(*runs, "--output", tmp_path)
    warning = "megallama: the configs of these runs differ in optimizer.lr, optimizer.clip, model.x and 2 other keys\n"
    assert done.stderr == warning
    page = Parsed((tmp_path / "report.html").read_text())
    assert [max(run["curves"][0]["steps"]) for run in page.data["runs"]] == [20, 7, 3]
    assert "optimizer.lr" in page.text and "<b>" in page.text and "run.dir" not in page.text


def test_runs_of_one_config_give_no_warning(tmp_path: Path) -> None:
    runs = [plain_run(tmp_path / name) for name in "ab"]
    for run in runs:
        (run / "config.yaml").write_text(f"run: {{dir: {run}}}\noptimizer: {{lr: 1e-3}}\n")
    assert report(*runs, "--output", tmp_path).stderr == ""
    assert "configs differ" not in (tmp_path / "report.html").read_text()


def test_no_display_is_needed(tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run")
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    command = [str(BIN / "megallama"), "report", str(run)]
    environment |= {"MPLBACKEND": "TkAgg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert (run / "report.png").stat().st_size > 10_000


def test_other_commands_do_not_wait_for_what_draws() -> None:
    script = "import sys, megallama.cli; print([m for m in ('matplotlib', 'torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{tmp}/nowhere"], "{tmp}/nowhere/metrics.jsonl cannot be read (No such file or directory); give a run that"),
        (["{tmp}"], "{tmp}/metrics.jsonl cannot be read (No such file or directory); give a run that has trained"),
        (["{run}/metrics.jsonl"], "{run}/metrics.jsonl/metrics.jsonl cannot be read (Not a directory); give a run"),
        (["{run}", "{run}"], "{run} {run} has a run twice; name each once"),
        (["{run}", "{tmp}"], "{tmp}/metrics.jsonl cannot be read"),
        (["{run}", "--output", "{tmp}/no"], "--output={tmp}/no is neither a folder that exists nor an .html file"),
        (["{run}", "--output", "{tmp}/x.png"], "--output={tmp}/x.png is neither a folder that exists nor an .html"),
        (["{run}", "--output", "{tmp}/no/x.html"], "cannot be written (No such file or directory); give --output"),
        (["{run}", "--output", "{tmp}/old.html"], "{tmp}/old.html exists; write over it with --force, or give another"),
        (["{run}", "--output", "{tmp}/pic.html"], "{tmp}/pic.png exists; write over it with --force, or give another"),
        (["{run}", "--force", "--output", "{tmp}/dir.html"], "{tmp}/dir.html/report.html"),
        (["{run}", "--output", "/proc/x.html"], "cannot be written (No such file or directory)"),
    ],
)
def test_bad_input_is_a_sentence(words: list[str], sentence: str, tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run", 3)
    (tmp_path / "old.html").write_text("old")
    (tmp_path / "pic.png").write_text("old")
    (tmp_path / "dir.html" / "report.html").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as refused:
        report(*(word.format(tmp=tmp_path, run=run) for word in words))
    assert sentence.format(tmp=tmp_path, run=run) in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.html").read_text() == (tmp_path / "pic.png").read_text() == "old"


def test_a_newer_report_takes_the_place_of_an_older_one_and_of_nothing_else_unless_forced(tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run", 3)
    report(run)
    first = (run / "report.html").read_text()
    with (run / METRICS).open("a") as file:
        file.write('{"event": "rewind", "step": 3}\n')
    report(run)
    second = (run / "report.html").read_text()
    assert second != first
    (run / "report.html").write_text("mine")
    with pytest.raises(UserError, match=r"report\.html exists; write over it with --force, or give another --output$"):
        report(run)
    report(run, "--force")
    assert (run / "report.html").read_text() == second


def test_a_full_disk_leaves_no_half_report(tmp_path: Path) -> None:
    run = plain_run(tmp_path / "run", 3)
    words = f"ulimit -f 20; exec {BIN / 'megallama'} report {run}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", words], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(r"megallama: \S+ cannot be written \(File too large\); give --output .*\n", done.stderr)
    assert [path.name for path in run.iterdir()] == [METRICS]


def test_runs_are_called_by_what_tells_them_apart() -> None:
    assert names_of([Path("runs/a"), Path("runs/b/")]) == ["a", "b"]
    assert names_of([Path("x/run"), Path("y/run"), Path("z")]) == ["x/run", "y/run", f"{Path.cwd().name}/z"]
