"""Names and paths that a shell, sbatch, a terminal or a file system would take for something else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megallama.cli import app
from megallama.cli import main as megallama
from megallama.cluster.job_file import Allocation, job_file, log_of, log_pattern
from megallama.config.keys import LEGAL_KEYS, SECTIONS
from megallama.config.load import load_config
from megallama.errors import SharedError, UserError
from megallama.run_dir.limits import check_run_dir
from megallama.run_dir.terminal import LivePanel, PlainLines
from tests.launching import CONFIG, arguments, pretrain

HIDDEN = ["\0", "\n", "\r", "\t", "\x1b[31m", "\x7f", "\x85", "\u200b", "\u2028", "\u2029", "\u202e", "\ufeff"]
NAMES = ["run.dir", "data.path", "data.tokenizer", "data.validation_path", "checkpoint.init_from", "checkpoint.resume"]
NAMES += ["evaluation.sets.web"]
ODD = [
    "a b", "a'b", 'a"b', "$(touch PWNED)", "`touch PWNED`", "a;touch PWNED", "a&&touch PWNED", "*?[x]", "{a,b}", "~",
    "#b", " #b", "-x", "--wrap=x", "!x", "%j-%x", "100%", "naïve 中文", "a\\b", "x" * 255,
]  # fmt: skip


@pytest.mark.parametrize("key", NAMES)
def test_a_name_holds_no_character_that_does_not_show(key: str) -> None:
    for hidden in HIDDEN:
        with pytest.raises(UserError) as refusal:
            load_config(CONFIG, [f"{key}={json.dumps(f'runs/x{hidden}touch PWNED')}"])
        assert_shows(str(refusal.value), f'{key}="runs/x')
        assert "do not print" in str(refusal.value)


def test_no_key_takes_a_line_end() -> None:
    """Whatever keys come."""
    for key in set(LEGAL_KEYS) - {*SECTIONS, "model.import"}:
        wandb = ["logging.wandb={project: x}"] if key.startswith("logging.wandb.") else []
        with pytest.raises(UserError) as refusal:
            load_config(CONFIG, [*wandb, f'{key}="a/\\nb"'])
        assert_shows(str(refusal.value), "")


@pytest.mark.parametrize("key", NAMES)
def test_a_name_is_as_long_as_a_file_system_takes(key: str) -> None:
    for name in ("runs/" + "x" * 300, "runs/" + "é" * 128, "x/" * 501):
        with pytest.raises(UserError, match="names of at most 255 bytes, 1000 in a path") as refusal:
            load_config(CONFIG, [f"{key}={name}"])
        assert len(str(refusal.value)) < 250
    load_config(CONFIG, [f"{key}=runs/{'é' * 127}/naïve 中文"])


@pytest.mark.parametrize("name", ["x" * 300, "nowhere\0x", "nowhere/\x1b[2J", "/dev/null/x"])
def test_a_file_that_no_file_system_has_is_a_sentence(name: str) -> None:
    for config, overrides in ((name, []), (CONFIG, [f"model.import={json.dumps(name)}"])):
        with pytest.raises(UserError) as refusal:
            load_config(config, overrides)
        assert_shows(str(refusal.value), "")


@pytest.mark.parametrize("value", ["runs/a #b", "#b", '"runs/a" # b'])
def test_an_override_is_read_to_its_end(value: str) -> None:
    """YAML takes the rest for a comment, and the run would go to another directory than the one that was typed."""
    with pytest.raises(UserError) as refusal:
        load_config(CONFIG, [f"run.dir={value}"])
    assert "YAML reads no further than the #" in str(refusal.value)
    assert load_config(CONFIG, [f"run.dir={json.dumps(value)}"]).run.dir == value


@pytest.mark.parametrize("kind", [UserError, SharedError])
def test_a_sentence_shows_what_it_quotes(kind: type[UserError]) -> None:
    assert str(kind("naïve 中文 \x1b[2J\n\u202e\udcff\u2028")) == r"naïve 中文 \x1b[2J\n\u202e\udcff\u2028"


@pytest.mark.parametrize("override", ["\x1b[31mfoo=3", "train.steps=\x1b[31m", "--\x1b[31m", 'model={"\\e[3": 1}'])
def test_no_word_of_a_start_reaches_the_terminal_as_it_stands(override: str, tmp_path: Path) -> None:
    ((code, said),) = pretrain(1, arguments("nowhere", tmp_path / "run", override))
    assert code == 2
    assert_shows(said.rstrip("\n"), "megallama: ")


def test_a_notice_of_a_run_does_not_act_on_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    for terminal in (PlainLines(), LivePanel(0)):
        terminal.write({"event": "notice", "text": "continues \x1b[2J[bold]here"})
        assert capfd.readouterr().out == "continues \\x1b[2J[bold]here\n"


def test_a_hostile_side_file_does_not_act_on_the_terminal(byte_dataset: str, tmp_path: Path) -> None:
    for path in Path(byte_dataset).parent.glob("corpus.*"):
        shutil.copy(path, tmp_path)
    info = json.loads((tmp_path / "corpus.json").read_text()) | {"tokenizer": "\x1b[2Jbytes"}
    (tmp_path / "corpus.json").write_text(json.dumps(info))
    assert r"\x1b[2Jbytes" in CliRunner().invoke(app, ["data", "info", str(tmp_path / "corpus")]).output


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("file", "file is not a folder"),
        ("file/run", "file is not a folder"),
        ("fifo", "fifo is not a folder"),
        ("dangling", "dangling is not a folder"),
        ("dangling/run", "dangling is not a folder"),
        ("loop/run", "(Too many levels of symbolic links)"),
        ("/dev/null/run", "/dev/null is not a folder"),
        ("/proc/run", "0.00 GB of free disk"),
    ],
)
def test_a_run_directory_that_cannot_be_made(name: str, why: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError) as refusal:
        check_run_dir(tmp_path / name, 1)
    assert str(refusal.value).startswith(f"run.dir={tmp_path / name} ")
    assert why in str(refusal.value)
    assert str(refusal.value).endswith("use another run.dir")


def test_a_run_directory_too_deep_for_what_a_run_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    while len(str(Path.cwd())) < 3500:
        Path("w" * 250).mkdir()
        monkeypatch.chdir("w" * 250)
    with pytest.raises(UserError, match=r"is a URL, and a run is saved on a disk"):
        check_run_dir(Path("s3://bucket/run"), 0)
    with pytest.raises(UserError, match=r"cannot be made \(File name too long\); use another run.dir"):
        check_run_dir(Path("r" * 250, "r" * 250), 1)


@pytest.mark.parametrize("odd", ODD)
def test_a_job_file_passes_on_the_very_words_and_runs_nothing_else(odd: str, tmp_path: Path) -> None:
    (tmp_path / "checkout" / "slurm").mkdir(parents=True)
    (tmp_path / "checkout" / "slurm" / "run.sh").write_text("printf '%s\\0' \"$@\"\n")
    words = [f"run.dir={json.dumps(odd)}", f"data.path={odd}"]
    text = job_file(Path(odd), words, Path(odd).absolute(), "%x-%j.log", allocation("--comment=" + odd))
    (tmp_path / "job.sh").write_text(text)
    environment = {"PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path / "checkout")}
    found = subprocess.run(["bash", "job.sh", "a=b"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (found.stdout.split("\0"), found.stderr) == ([odd, *words, "a=b", ""], "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkout", "job.sh"]
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert as_sbatch_reads(lines[-1]) == f"#SBATCH --comment={odd}"


def test_a_log_of_slurm_is_where_the_run_says(tmp_path: Path) -> None:
    assert log_pattern(Path("/runs/%j 100%")) == "/runs/%%j 100%%/logs/job-%j.log"
    assert log_of(Path("/runs/%j 100%"), "7") == "/runs/%j 100%/logs/job-7.log"
    with pytest.raises(UserError, match=r"^run.dir=/runs/a\\b holds a backslash, which Slurm takes"):
        log_pattern(Path("/runs/a\\b"))


@pytest.mark.parametrize("hidden", HIDDEN)
def test_a_job_file_holds_no_word_that_ends_its_line(hidden: str) -> None:
    bad = f"x{hidden}touch PWNED"
    for config, override, log, time, option in (
        (bad, "a=b", "log", "1:00", "--exclusive"),
        ("c.yaml", bad, "log", "1:00", "--exclusive"),
        ("c.yaml", "a=b", bad, "1:00", "--exclusive"),
        ("c.yaml", "a=b", "log", bad, "--exclusive"),
        ("c.yaml", "a=b", "log", "1:00", f"--comment={bad}"),
    ):
        with pytest.raises(UserError) as refusal:
            job_file(Path(config), [override], Path("/run"), log, allocation(option, time=time))
        assert_shows(str(refusal.value), "")


@pytest.mark.parametrize("option", ["partition=gpu", "", "hetjob", "#x", "--wrap=touch PWNED"])
def test_what_is_no_option_of_a_job_file(option: str) -> None:
    with pytest.raises(UserError, match="is no option of a job file; write one as --option=--partition=gpu"):
        job_file(Path("c.yaml"), [], Path("/run"), "log", allocation(option))


@pytest.mark.parametrize(
    "words",
    [
        ["launch", "configs/\ndebug.yaml"],
        ["launch", CONFIG, 'run.dir="x\\ntouch PWNED\\n"', "--dry-run"],
        ["launch", CONFIG, "--time=1:00\ntouch PWNED"],
        ["launch", CONFIG, "--option=--partition=\ngpu"],
        ["data", "build", "stdlib", "--output", "x\x1b[31m"],
        ["tokenizer", "info", "\x1b[31m"],
        ["plan", CONFIG, "--plot", "x\u202e.png"],
        ["generate", "runs/\x1b[31m"],
        ["--\x1b[31m"],
        ["plan", "x" * 300],
        ["launch", "x" * 300 + ".yaml"],
        ["generate", "x" * 300],
        ["checkpoint", "verify", "x" * 300],
        ["plan", "--calibrate", "x" * 300],
    ],
    ids=lambda words: ascii(" ".join(words))[:40],
)
def test_a_command_refuses_names_in_one_sentence(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megallama", *words])
    with pytest.raises(SystemExit) as end:
        megallama()
    assert end.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert_shows(said.err.removesuffix("\n"), "megallama: ")


@pytest.mark.parametrize("prompt", [["--prompt", "def main(\n"], ["--prompt=\tdef"]])
def test_a_prompt_may_have_lines(
    prompt: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["megallama", "generate", "nowhere", *prompt])
    with pytest.raises(SystemExit):
        megallama()
    assert "nowhere is not a folder" in capsys.readouterr().err


def assert_shows(sentence: str, beginning: str) -> None:
    assert sentence.startswith(beginning)
    assert sentence.isprintable(), ascii(sentence)


def allocation(option: str, time: str = "1:00") -> Allocation:
    return Allocation(1, 2, False, time, 30, (option,))


def as_sbatch_reads(line: str) -> str:
    """Its quotes, in which, other than in a shell's, a backslash counts; tests/slurm asks the real one."""
    text, quote, chars = "", "", iter(line)
    for char in chars:
        if char == "\\":
            text += next(chars)
        elif char in "'\"" and quote in ("", char):
            quote = "" if quote else char
        else:
            text += char
    return text
