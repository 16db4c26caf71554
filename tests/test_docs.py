"""The documents against what they speak of: links, files, commands, overrides, dependencies and the schema."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from megallama.cli import app
from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.plan.memory.ledger import held_rows
from megallama.plan.memory.state import GIB, rank_parameters

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PARALLELISM = (ROOT / "docs" / "parallelism.md").read_text()

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_configuration_page_is_what_the_generator_makes() -> None:
    generator = _generator()
    page = generator.PAGE.read_text()
    assert page == generator.regenerate(page), "run python docs/generate_configuration.py"


def test_every_key_of_the_schema_is_on_the_configuration_page() -> None:
    from megallama.config.keys import LEGAL_KEYS

    page = _generator().PAGE.read_text()
    assert [key for key in LEGAL_KEYS if "." in key and f"`{key}`" not in page] == []


@by_page
def test_relative_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    relative = [link.partition("#")[0] for link in links if "://" not in link and not link.startswith("#")]
    assert [link for link in relative if not (page.parent / link).exists()] == []


@by_page
def test_named_files_exist(page: Path) -> None:
    named = re.findall(
        r"\b(?:configs/[\w.-]+\.yaml|(?:slurm|launch|megallama|docs)/[\w./-]+\.(?:py|sh|md))\b", page.read_text()
    )
    assert [name for name in named if not (ROOT / name).exists()] == []


@by_page
def test_commands_are_accepted_or_refused_as_shown(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words, refusal in _commands(page):
        if refusal:
            command, arguments = _command(words[1:])
            with pytest.raises(UserError) as refused:
                command.main(arguments, standalone_mode=False)
            assert str(refused.value) == refusal
        elif words[0] == "megallama":
            _parse(words[1:])
        elif "launch/pretrain.py" in words:
            arguments = words[words.index("launch/pretrain.py") + 1 :]
            assert arguments[0] == "--config", words
            made = arguments[1].startswith("runs/")  # by the command that the page has above
            load_config(ROOT / ("configs/debug.yaml" if made else arguments[1]), arguments[2:])
        elif words[0] == "sbatch":
            script, *overrides = [word for word in words[1:] if not word.startswith("--")]
            assert (ROOT / script).is_file(), words
            load_config(ROOT / "configs" / f"{Path(script).stem}.yaml", overrides)
        elif words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words


@by_page
def test_timelines_are_what_the_commands_above_them_draw(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    blocks = r"^```\n(megallama plan [^\n]* --timeline)\n```\n\n```\n(.*?)^```$"
    found = re.findall(blocks, page.read_text(), re.MULTILINE | re.DOTALL)
    assert len(found) == page.read_text().count("\nwaiting: ")
    for command, drawn in found:
        assert _output(*shlex.split(command)[1:]) == drawn, command


SCHEDULES = ("1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble")


@pytest.mark.parametrize("row", ["4", "8", "16", "32", "64"])
def test_the_table_of_waiting_is_what_its_command_prints(row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    head, rows = _table("| micro-batches | 1f1b |")
    assert head[1:] == list(SCHEDULES)
    for schedule, share in zip(SCHEDULES, rows[row], strict=True):
        if share != "-":
            assert f"waiting: {share.replace(' ', '')} of all ranks' time" in _timeline_7b(schedule, int(row))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_table_of_what_is_kept_is_what_its_command_prints(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, rows = _table("| schedule | rank 0 |")
    for micro_batches in (8, 16, 64):
        last = _timeline_7b(schedule, micro_batches).splitlines()[-1]
        assert (
            last == f"kept for backward, at most: {' '.join(rows[schedule])} micro-batches through all layers of a rank"
        )


def test_numbers_of_waiting_beside_the_tables_are_those_of_their_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = " ".join(PARALLELISM.split())
    assert "`parallel.chunks=4` takes the 13.0 % above to 9.4 %" in text
    assert "waiting: 13.0%" in _timeline_7b("interleaved1f1b", 16)
    assert "waiting: 9.4%" in _timeline_7b("interleaved1f1b", 16, "parallel.chunks=4")
    assert "At pp 4 it makes 8, 9, 9 and 6 layers, and 9.1 % waiting at 64 micro-batches" in text
    assert "`even` makes 8 of each, and 18.5 %" in text
    balanced, even = (
        _output(*shlex.split(command))
        for command in re.findall(r"^megallama (plan configs/8b.*--timeline)", PARALLELISM, re.MULTILINE)
    )
    assert "64 micro-batches, 4 pipeline ranks, layers per stage 8 9 9 6\n" in balanced
    assert "waiting: 9.1%" in balanced
    assert "layers per stage 8 8 8 8\n" in even
    assert "waiting: 18.5%" in even


@by_page
def test_commands_in_running_text_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for code in re.findall(r"`megallama ([a-z][^`]*)`", text):
        words = shlex.split(code)
        command, arguments = _command(words)
        options = {option for parameter in command.params for option in parameter.opts}
        assert [word for word in arguments if word.startswith("--") and word not in options] == [], code


def test_documents_name_no_place_of_the_machine_they_were_written_on() -> None:
    found = [(page.name, word) for page in PAGES for word in re.findall(r"/(?:home|root|work)/\S*", page.read_text())]
    assert found == []


def test_the_readme_tells_the_size_of_the_package() -> None:
    (said,) = re.findall(r"about ([\d,]+) lines", (ROOT / "README.md").read_text())
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "megallama").rglob("*.py"))
    assert lines == pytest.approx(int(said.replace(",", "")), rel=0.03)


def test_nothing_stray_is_committed() -> None:
    """Pictures, logs and runs of somebody's trials end up where a command was typed."""
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    folders = {".ci", "benchmarks", "configs", "docs", "launch", "megallama", "slurm", "tests"}
    assert {path for path in found if "/" not in path} == {".gitignore", "Makefile", "README.md", "pyproject.toml"}
    assert {path.partition("/")[0] for path in found if "/" in path} == folders
    kinds = {Path(path).suffix for path in found if not path.startswith(("tests/checkpoint/fixtures/", ".ci/"))}
    assert kinds - {""} == {".css", ".html", ".js", ".md", ".png", ".py", ".sh", ".toml", ".yaml"}
    assert [path for path in found if path.endswith(".png")] == ["docs/report.png"]


def test_every_dependency_has_its_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [*project["dependencies"], *(r for extra in project["optional-dependencies"].values() for r in extra)]
    names = [match[0] for requirement in required if (match := re.match(r"[\w.-]+", requirement))]
    page = (ROOT / "docs" / "dependencies.md").read_text()
    assert names
    assert [name for name in names if f"| `{name}` |" not in page] == []


def _commands(page: Path) -> list[tuple[list[str], str]]:
    """Every command in a code block, as words, and the sentence with which it is refused if the page shows one."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in [*block.replace("\\\n", " ").splitlines(), ""]]
    command = re.compile(r"(?:\$ )?(?P<words>(?:megallama|make|sbatch|python|torchrun|deepspeed) .*)")
    found = []
    for line, following in pairwise(lines):
        if match := command.fullmatch(line):
            refusal = following.removeprefix("megallama: ") if following.startswith("megallama: ") else ""
            found.append((shlex.split(match["words"].partition(" > ")[0]), refusal))
    return found


def _output(*words: str) -> str:
    """What `megallama WORDS` prints in a terminal of 120 columns."""
    result = CliRunner().invoke(app, words, env={"COLUMNS": "120"})
    assert result.exit_code == 0, words
    return result.stdout


def _timeline_7b(schedule: str, micro_batches: int, *more: str) -> str:
    batch = f"train.global_batch_size={8 * micro_batches}"
    words = ["plan", "configs/7b.yaml", "--gpus", "16", batch, f"parallel.schedule={schedule}", *more, "--timeline"]
    found = _output(*words)
    assert f"{schedule}, {micro_batches} micro-batches, 4 pipeline ranks" in found
    return found


def test_the_state_of_a_layout_is_what_the_plan_says() -> None:
    _, rows = _table("| layout | dp | state, GiB |")
    assert len(rows) == 6
    for layout, (dp, gib) in rows.items():
        name, size = layout.split()
        key = "zero.stage" if name == "ZeRO" else "parallel.tensor"
        config = load_config(
            ROOT / "configs" / "7b.yaml", ["parallel.pipeline=1", "parallel.tensor=1", f"{key}={size}"]
        )
        (rank,) = rank_parameters(config)
        assert gib == f"{sum(row.size for row in held_rows(config, rank, int(dp))) / GIB:.2f}", layout


def _table(beginning: str) -> tuple[list[str], dict[str, list[str]]]:
    """The head of the table of docs/parallelism.md that begins so, and its rows by their first cell."""
    head, _, *rows = re.findall(r"^\|.*\|$", PARALLELISM[PARALLELISM.index(beginning) :].split("\n\n")[0], re.MULTILINE)
    first, *others = [[cell.strip() for cell in row.strip("|").split("|")] for row in (head, *rows)]
    return first, {row[0]: row[1:] for row in others}


def _parse(words: list[str]) -> None:
    """Fails where `megallama WORDS` would be refused for its options, its configuration or its overrides."""
    command, arguments = _command(words)
    given = command.make_context("megallama", arguments).params
    if given.get("config_path") is not None:
        load_config(ROOT / given["config_path"], given["overrides"] or ())


def _command(words: list[str]) -> tuple[Any, list[str]]:
    """The command that the first words name, and what is left for it."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words:
        assert words[0] in command.commands, f"megallama has no command {words}"
        command, words = command.commands[words[0]], words[1:]
    return command, list(words)


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_configuration", ROOT / "docs" / "generate_configuration.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
