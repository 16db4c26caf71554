"""Who is asked about a mutant: types, layer tests and verify. Each is a command in a mutated copy of the tree."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import cache_from_source
from pathlib import Path
from typing import Literal

from tests.launching import ROOT, clean_environment, kill_all
from tests.mutants.mutant import Mutant
from tests.mutants.of_model import NORMED, ONE_KEY_HEAD

Answer = Literal["caught", "hangs", "missed", "not there"]
JUDGES = ("types", "layers", "verify")
CAUGHT: tuple[Answer, ...] = ("caught", "hangs")
CONFIG = "configs/debug.yaml"
SECONDS = 240
"""After which a command hangs. What does not takes 40 on two cores that nobody else uses."""

LAYER_TESTS = [
    "tests/layout/test_topology.py",
    "tests/data/test_sampler.py::test_ranks_and_micro_batches_cover_a_step_exactly_once",
    "tests/data/test_loader.py::test_batches_over_all_ranks_equal_those_of_one",
    "tests/data/test_loader.py::test_evaluation_labels_do_not_depend_on_the_layout",
    "tests/data/test_loader.py::test_shapes_types_and_labels_are_the_next_tokens",
    "tests/data/test_context.py",
    "tests/model/test_attention.py::test_positions_begin_anew_in_each_document",
    "tests/model/test_attention.py::test_attention_within_documents_is_that_of_a_dense_mask",
    "tests/model/test_attention.py::test_recomputation_stays_within_documents",
    "tests/model/test_attention.py::test_a_document_has_the_loss_in_a_packed_sample_that_it_has_alone",
    "tests/model/test_layers.py",
    "tests/model/test_recompute.py",
    "tests/model/test_context_parallel.py",
    "tests/parallel/test_mesh.py",
    "tests/parallel/test_types.py",
    "tests/train/test_gradients.py",
    "tests/train/test_zero.py::test_every_stage_updates_what_one_rank_alone_does",
    "tests/train/test_zero.py::test_a_step_begins_without_the_gradients_of_the_one_before",
    "tests/train/test_pipeline.py::test_a_split_backward_does_the_work_of_a_whole_one[zbvzerobubble]",
]
TYPED = [
    ["parallel.tensor=2", "--gpus", "4", *NORMED],
    ["parallel.tensor=2", "parallel.sequence=false", "parallel.pipeline=2", "--gpus", "8", *ONE_KEY_HEAD, *NORMED],
    ["parallel.context=2", "data.document_mask=true", "--gpus", "4"],
    ["parallel.context=2", "parallel.context_mode=ulysses"],
]
"""Overrides of the configs whose collectives are typed, and their ranks."""


@dataclass(frozen=True)
class Copy:
    """A copy of what is judged, in a folder of its own."""

    root: Path

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """Inside, the mutant's file is as it says."""
        path = self.root / "megallama" / mutant.path
        text, changed = path.read_text(), mutant.applied(self.root / "megallama")
        try:
            _write(path, changed)
            yield
        finally:
            _write(path, text)

    def run(self, name: str, command: Sequence[str], seconds: int) -> tuple[int | None, str]:
        """Exit code, None after so long, and what was printed; no process of it is left. One of a name at a time."""
        home = self.root / f"home of {name}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir()
        environment = clean_environment(home, PYTHONPATH=str(self.root), OMP_NUM_THREADS="1")
        with (home / "log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait(seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                kill_all(home)  # every process that has this home, in whichever group
                process.wait()
        return code, (home / "log").read_text(errors="replace")


@contextmanager
def copied() -> Iterator[Copy]:
    """A copy of the package and its tests for as long as it is needed."""
    with tempfile.TemporaryDirectory(prefix="megallama-mutants-") as name:
        for part in ("megallama", "tests", "configs", "launch"):
            shutil.copytree(ROOT / part, Path(name) / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", name)
        yield Copy(Path(name))


def ask(judge: str, copy: Copy, mutants: Sequence[Mutant]) -> tuple[Answer, str]:
    """What a judge of `mutants` says of `copy`, which holds one of them or none, and what it printed.

    RuntimeError where it says neither that all is well nor that something is wrong.
    """
    for command in commands(judge, mutants):
        code, printed = copy.run(judge, command, SECONDS * len(mutants))
        if code is None:
            return "hangs", printed
        if code == 2 and "No such option: --types" in printed:
            return "not there", printed
        if code not in (0, 1):
            raise RuntimeError(f"{judge} ended with {code}, which is no verdict:\n{printed}")
        if code == 1:
            return "caught", printed
    return "missed", ""


def commands(judge: str, mutants: Sequence[Mutant]) -> list[list[str]]:
    """What a judge of `mutants` runs: exit code 1 from any of these catches, 0 from all does not."""
    if judge == "types":
        return [["-m", "megallama", "verify", CONFIG, *overrides, "--types"] for overrides in TYPED]
    if judge == "layers":
        return [["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *LAYER_TESTS]]
    return [
        ["-m", module, "verify", CONFIG, *words, "--steps", "1", "--layouts", ",".join(layouts)]
        for (module, words), layouts in _runs(mutants).items()
    ]


def _runs(mutants: Sequence[Mutant]) -> dict[tuple[str, tuple[str, ...]], dict[str, None]]:
    """Of verify: the layouts of each module and its words, once."""
    found: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}
    for mutant in mutants:
        module = "tests.mutants.in_tiles" if mutant.in_tiles else "megallama"
        found.setdefault((module, mutant.words), {})[mutant.layout] = None
    return found


def _write(path: Path, text: str) -> None:
    """And forget what was compiled: it may be of another text of the same length and second."""
    path.write_text(text)
    Path(cache_from_source(str(path))).unlink(missing_ok=True)
