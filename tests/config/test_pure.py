"""Costing and reading a run must work, and start at once, where torch and deepspeed are absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import megallama.config
import megallama.hardware
import megallama.layout
import megallama.plan
import megallama.run_dir
import megallama.system

PACKAGES = (megallama.config, megallama.hardware, megallama.layout, megallama.plan, megallama.run_dir, megallama.system)
IMPURE = {
    "megallama.hardware.compiler",
    "megallama.hardware.fp8",
    "megallama.hardware.measure",
    "megallama.plan.memory.dry_run",
}
"""Imported when `plan --check` or `plan --calibrate` asks for it."""
HEAVY = ("torch", "deepspeed", "numpy", "transformers", "tiktoken", "tokenizers", "wandb", "tensorboard")

PROGRAM = """
import importlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {heavy!r}:
            raise ImportError("imported here: " + name)

sys.meta_path.insert(0, Refuse())
for module in {modules!r}:
    importlib.import_module(module)
{then}
"""


def pure_modules() -> list[str]:
    modules = [
        "megallama.errors",
        "megallama.train.lr_schedule",
        "megallama.data.sampler",
    ]
    for package in PACKAGES:
        root = Path(package.__path__[0])
        names = [".".join(file.relative_to(root).with_suffix("").parts) for file in sorted(root.rglob("*.py"))]
        modules += [f"{package.__name__}.{name}" for name in names if not name.endswith("__init__")]
    return [module for module in modules if module not in IMPURE]


def run_without_heavy_packages(modules: list[str], then: str = "") -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(heavy=HEAVY, modules=modules, then=then)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)


def test_pure_modules_import_without_torch_and_deepspeed() -> None:
    modules = pure_modules()
    assert {"megallama.config.load", "megallama.plan.cli"} <= set(modules)
    done = run_without_heavy_packages(modules)
    assert done.returncode == 0, done.stderr


def test_the_hook_of_this_test_does_refuse() -> None:
    assert "imported here: torch" in run_without_heavy_packages([], then="import torch").stderr


def test_a_plan_is_made_without_torch_and_deepspeed() -> None:
    then = "megallama = sys.modules['megallama.plan.cli']; megallama.plan(flops='1e21')"
    done = run_without_heavy_packages(["megallama.plan.cli"], then)
    assert done.returncode == 0, done.stderr
    assert "2.778e+09" in done.stdout


def test_no_command_waits_for_the_schema_of_a_run_before_it_needs_it() -> None:
    """Building the schema takes a quarter of a second, half of what `megallama --help` may take."""
    done = run_without_heavy_packages(["megallama.cli"], "assert 'megallama.config.schema' not in sys.modules")
    assert done.returncode == 0, done.stderr


def test_the_process_that_writes_for_a_rank_imports_little() -> None:
    """A thousand of them start at once, from one disk; that of rank 0 commits as well."""
    then = "assert not {'pydantic', 'yaml', 'megallama.checkpoint.format'} & sys.modules.keys()"
    done = run_without_heavy_packages(["megallama.checkpoint.writing.writer"], then)
    assert done.returncode == 0, done.stderr
