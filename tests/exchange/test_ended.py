"""`megallama import` and `megallama export` that a signal ends: nothing is left, at the latest after the next one."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from megallama.exchange.incoming import import_folder
from tests.exchange.foreign import random_llama, save
from tests.faults.runs import wait_for
from tests.launching import BIN, ROOT, clean_environment, execute

WORDS = {"import": ["data.tokenizer=bytes"], "export": ["--dtype", "fp32"]}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each command reads: 100 MB, of which the writing lasts long enough to be ended."""
    home = tmp_path_factory.mktemp("large")
    model = random_llama(hidden_size=1024, intermediate_size=3072, num_hidden_layers=2)
    import_folder(save(model, home / "model"), home / "run", WORDS["import"], None, None)
    return {"import": home / "model", "export": home / "run"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where OUT is to be; beside it is the home of the commands."""
    made = tmp_path / "models"
    made.mkdir()
    return made


def ended_by(number: signal.Signals, words: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and stderr of a command that is ended once it has begun to write weights."""
    process = subprocess.Popen(
        words, cwd=ROOT, env=clean_environment(folder.parent), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    wait_for(lambda: any(file.suffix in (".bin", ".safetensors") for file in folder.glob(".out.partial/**/*")))
    process.send_signal(number)
    said = process.communicate(timeout=60)[1].decode()
    return process.returncode, said


def words_of(command: str, source: Path, folder: Path) -> list[str]:
    return [str(BIN / "megallama"), command, str(source), str(folder / "out"), *WORDS[command]]


@pytest.mark.parametrize("command", WORDS)
def test_sigterm_ends_in_one_sentence_and_leaves_nothing(command: str, sources: dict[str, Path], folder: Path) -> None:
    sentence = "megallama: ended by SIGTERM; the same command starts again\n"
    assert ended_by(signal.SIGTERM, words_of(command, sources[command], folder), folder) == (143, sentence)
    assert list(folder.iterdir()) == []


def test_what_a_killed_command_left_goes_with_the_next(sources: dict[str, Path], folder: Path) -> None:
    words = words_of("import", sources["import"], folder)
    assert ended_by(signal.SIGKILL, words, folder) == (-9, "")
    assert sorted(path.name for path in folder.iterdir()) == [".out.lock", ".out.partial"]
    (folder / ".out.partial" / "half").touch()
    assert execute(words, folder.parent).code == 0
    assert [path.name for path in folder.iterdir()] == ["out"]
    assert not (folder / "out" / "half").exists()
