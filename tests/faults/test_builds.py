"""A build, a part or a merge that is killed at any moment, and repeated: the bytes of one that nothing happened to."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import zstandard

from megallama.corpus.building.build import build_dataset
from megallama.text.tokenizer import tokenizer_from_ranks
from tests.launching import BIN, ROOT, clean_environment, kill_all, outliving, processes_of

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

KILLS = 20
KILLS_OF_ONE = 4
FILES = 4


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with sources of many blocks, a tokenizer that takes its time, and what they make."""
    folder, random = tmp_path_factory.mktemp("corpus"), Random(5)
    (folder / "text").mkdir()
    merges = [a + b for a in (b"a", b"e", b"o", b"n", b"t") for b in (b"n", b"r", b"s", b"t", b" ")]
    ranks = {bytes([i]): i for i in range(256)} | {merge: 256 + i for i, merge in enumerate(merges)}
    tokenizer_from_ranks(ranks).save(folder / "tokenizer")
    words = ["".join(random.choices("aeonrst", k=random.randint(2, 9))) for _ in range(2000)]
    for number in range(FILES):
        lines = [json.dumps({"text": " ".join(random.choices(words, k=300))}) for _ in range(1200)]
        lines += lines[:50]  # duplicates
        (folder / "text" / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    blocks = "\n".join([*lines, *lines, *lines, *lines, *lines, *lines, *lines, *lines, *lines]).encode()
    (folder / "text" / "z.jsonl.zst").write_bytes(zstandard.compress(blocks))
    build_dataset([str(folder / "text")], str(folder / "whole"), str(folder / "tokenizer"), workers=1, deduplicate=True)
    return folder


def content(prefix: Path) -> list[bytes]:
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]


def commands(corpus: Path, prefix: Path, parts: int) -> Iterator[list[str]]:
    """That make the dataset, in one build or in parts."""
    build = [str(BIN / "megallama"), "data", "build", str(corpus / "text"), "--output", str(prefix), "--deduplicate"]
    build += ["--workers", "2", "--tokenizer", str(corpus / "tokenizer")]
    if parts == 1:
        yield build
        return
    for part in range(1, parts + 1):
        yield [*build, "--part", f"{part}/{parts}"]
    yield [str(BIN / "megallama"), "data", "merge", str(prefix)]


def run_killed(command: list[str], home: Path, random: Random, longest: float | None) -> bool:
    """Run it, and kill the build or one of its workers within `longest` seconds. Returns whether something was killed.

    If not, it has to succeed.
    """
    with (home / "err").open("w") as err:
        process = subprocess.Popen(
            command, cwd=ROOT, env=clean_environment(home), stdout=subprocess.DEVNULL, stderr=err
        )
        try:
            if longest is not None:
                time.sleep(random.uniform(0, longest))
                with suppress(ProcessLookupError):
                    os.kill(random.choice([process.pid, *processes_of(home)]), signal.SIGKILL)
            code = process.wait(120)
            assert outliving(home, 60.0) == []
        finally:
            kill_all(home)
            process.wait()
    said = (home / "err").read_text()
    assert "Traceback" not in said, said
    assert code in (0, -signal.SIGKILL) or (code == 2 and "the same command continues" in said), (code, said)
    return code != 0


def test_killed_at_random_moments_and_repeated(corpus: Path, tmp_path: Path) -> None:
    random, hits, rounds = Random(7), 0, 0
    while hits < KILLS:
        rounds += 1
        home = tmp_path / str(rounds)
        home.mkdir()
        for command in commands(corpus, home / "d", parts=(2, 1)[rounds % 2]):
            longest, kills = 1.0 if "merge" in command else 3.0, 0
            while run_killed(command, home, random, longest if kills < KILLS_OF_ONE else None):
                kills += 1
            hits += kills
        assert content(home / "d") == content(corpus / "whole")
        left = {path.name for path in home.iterdir() if not path.name.endswith(".lock")}
        assert left == {"d.bin", "d.idx", "d.json", "err"}
    print(f"{hits} kills in {rounds} rounds")


def test_a_ctrl_c_while_workers_start_is_told_once(corpus: Path, tmp_path: Path) -> None:
    """A terminal sends it to all of them, so to workers that cannot be silent yet."""
    (command,) = commands(corpus, tmp_path / "d", parts=1)
    process = subprocess.Popen(
        command, cwd=ROOT, env=clean_environment(tmp_path), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while not any(map(is_interruptible_worker, children.read_text().split())):
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "megallama: ended by Ctrl-C; the same command starts again\n"
    assert process.returncode == 130


def is_interruptible_worker(pid: str) -> bool:
    """Whether its Python has begun, which makes a traceback of a Ctrl-C."""
    with suppress(FileNotFoundError, ProcessLookupError):
        facts = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        is_worker = "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()
        return is_worker and bool(int(facts["SigCgt"], 16) >> signal.SIGINT - 1 & 1)
    return False


EVERY_OPERATION = """
import os, shutil, signal, sys
from pathlib import Path
from megallama.corpus.building import recipe
from megallama.corpus.building.build import build_dataset, build_part
from megallama.corpus.building.merge import merge_parts

what, folder = sys.argv[1], Path(sys.argv[2])
recipe.UNIT_BYTES = 100
source = [str(folder / "text")]

def build_parts(prefix):
    for part in (0, 1):
        build_part(source, prefix, "bytes", (part, 2), workers=1, deduplicate=True)

def make(prefix):
    if what == "build":
        build_dataset(source, prefix, "bytes", workers=1, deduplicate=True)
    if what == "parts":
        build_parts(prefix)
    if what != "build":
        merge_parts(prefix)

def forked(prefix, left):
    pid = os.fork()
    if pid == 0:
        def count(event, arguments):
            nonlocal left
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir") and str(folder) in str(arguments):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        make(prefix)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def content(prefix):
    return [Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json")]

build_dataset(source, str(folder / "whole"), "bytes", workers=1, deduplicate=True)
killed = 0
while True:
    home = folder / "home"
    home.mkdir()
    if what == "merge":
        build_parts(str(home / "d"))
    code = forked(str(home / "d"), killed + 1)
    if code == 0:
        break
    assert code == -signal.SIGKILL, code
    killed += 1
    assert forked(str(home / "d"), -1) == 0
    assert content(home / "d") == content(folder / "whole"), killed
    left = {path.name for path in home.iterdir() if path.suffix != ".lock"} - {"d.bin", "d.idx", "d.json"}
    assert not left, (killed, left)
    shutil.rmtree(home)
print(killed)
"""


@pytest.mark.parametrize(("what", "least"), [("build", 40), ("parts", 80), ("merge", 20)])
def test_killed_before_any_operation_on_the_disk_and_repeated(what: str, least: int, tmp_path: Path) -> None:
    """Each in turn, where chance would hardly hit the short ones."""
    (tmp_path / "text").mkdir()
    for number in range(3):
        (tmp_path / "text" / f"{number}.jsonl").write_text('{"text": "%s"}\n{"text": "again"}\n' % ("x" * 50 * number))
    code = [sys.executable, "-c", EVERY_OPERATION, what, str(tmp_path)]
    done = subprocess.run(code, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    print(f"killed before each of {done.stdout.strip()} operations")
    assert int(done.stdout) > least
