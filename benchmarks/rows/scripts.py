"""Rows C6 to C8 and G of the table: benchmarks with scripts of their own, run and read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rows.table import Aim, Found, Line

HERE = Path(__file__).parents[1]
CONTENDERS = ("engine", "engine-compile", "bare", "bare-compile", "transformers", "transformers-compile")
GPU_CONFIGS = ("110m", "1b")
OURS = "megallama"


def run(*words: str) -> dict[str, Any]:
    """What a script prints as JSON; it says by its exit code whether its aims are kept, which the table does itself."""
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    if not done.stdout.lstrip().startswith("{"):
        raise RuntimeError(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def data(row: str, megabytes: int, rounds: int, workers: str) -> Found:
    """C6: text to tokens, with a tokenizer trained on Python's library."""
    with tempfile.TemporaryDirectory(prefix="megallama-bench-") as folder:
        words = [sys.executable, "-m", "megallama", "tokenizer", "train", "stdlib", "--output", folder]
        subprocess.run([*words, "--vocab-size", "4096"], check=True, stdout=subprocess.DEVNULL)
        report = run(
            *(str(HERE / "data.py"), "--tokenizer", folder, "--megabytes", str(megabytes), "--rounds", str(rounds)),
            *("--workers", workers, "--json"),
        )
    found, contenders = Found(), report["contenders"]
    for name, mine in contenders.items():
        _, _, count = name.partition(" ")
        speed, ours = mine["megabytes_per_second"], contenders[f"{OURS} {count or 1}"]["megabytes_per_second"]
        if count:
            name = f"{name.split()[0]}, {count} worker{'s' if count != '1' else ''}"
        found.lines.append(
            Line(
                *(row, name, report["text_megabytes"] / speed, "s"),
                ratio=None if name == "reading" else speed / ours,
                memory_bytes=int(mine["memory_mib"] * 2**20),
                counted=f"{speed:.1f} MB/s, {mine['tokens']:,} tokens",
            )
        )
    if len({contenders[name]["tokens"] for name in contenders if name == "bare" or name.startswith(OURS)}) > 1:
        found.wrong.append("ours and the bare loop give different numbers of tokens")
    kept = report["aims"].items()
    found.notes += [f"{aim}: {'kept' if met else 'MISSED'}" for aim, met in kept]
    return found


def loader(row: str, config: Path, sources: int, megatokens: int, rounds: int) -> Found:
    """C7: batches of 8 x 2,049 tokens beside other loaders, and the start of a mixture far into a run."""
    found = windows(row, megatokens, rounds)
    report = run(str(HERE / "loader.py"), str(config), "--sources", str(sources), "--json")
    start = report["start"]
    begun = f"{start['processor_seconds']:.2f} s of a processor, {start['open_files']} files open"
    found.lines.append(Line(row, f"ours, start at sample {start['position']:,}", start["seconds"], "s", counted=begun))
    speed = f"{report['loader_tokens_per_second']:,.0f} tokens/s, {report['loader_over_model']:.0f} times as many"
    found.notes.append(f"a mixture of five datasets gives {speed} as a step of {config.name} takes")
    return found


def windows(row: str, megatokens: int, rounds: int) -> Found:
    """What windows.py finds."""
    found = run(str(HERE / "windows.py"), "--megatokens", str(megatokens), "--rounds", str(rounds), "--json")
    lines = [Line(**{**line, "row": row}) for line in found["lines"]]
    return Found(lines, [Aim(**aim) for aim in found["aims"]], found["notes"], found["wrong"])


def checkpoint(row: str, config: Path, overrides: tuple[str, ...], rounds: int) -> Found:
    """C8: saving and loading; the floor is the bytes of ours, written and synced."""
    words = [str(config), *overrides, "train.device=cpu", "train.micro_batch_size=1", "train.global_batch_size=1"]
    words.append("data.sequence_length=64")
    report = run(str(HERE / "checkpoint.py"), *words, "--rounds", str(rounds), "--json")
    contenders, found = report["contenders"], Found()
    disk = median(written(contenders[OURS]["bytes"]) for _ in range(3))
    for what in ("save", "load"):
        ours = contenders[OURS][f"{what}_seconds"]
        for name, mine in contenders.items():
            seconds, size = mine[f"{what}_seconds"], f"{mine['bytes_per_parameter']:.2f} bytes/parameter"
            if what == "save" and mine["unwritten_seconds"] > 0.01:
                size += f", {mine['unwritten_seconds']:.2f} s unwritten"
            floor = disk / seconds if what == "save" else None
            found.lines.append(
                Line(row, f"{name}, {what}", seconds, "s", ratio=ours / seconds, of_floor=floor, counted=size)
            )
    wait, ours = (contenders[name]["stall_seconds"] for name in ("dcp-async", OURS))
    counted = f"of a save of {contenders['dcp-async']['save_seconds']:.2f} s"
    found.lines.append(Line(row, "dcp-async, training waits", wait, "ms", ratio=ours / wait, counted=counted))
    saving = run(str(HERE / "saving.py"), *words, "--steps", "10", "--rounds", str(rounds), "--json")
    counted = f"of a synchronous save of {saving['synchronous_seconds']:.2f} s"
    found.lines.append(Line(row, "ours, training waits", saving["blocked_seconds"], "ms", counted=counted))
    found.aims.append(Aim("training waits, of a synchronous save", saving["blocked_ratio"], 0.15))
    return found


def written(size: int) -> float:
    """Seconds in which a file of so many bytes reaches the disk."""
    block = os.urandom(1 << 22)
    with tempfile.NamedTemporaryFile(prefix="megallama-bench-") as file:
        began = time.perf_counter()
        for _ in range(size // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began


def gpu(row: str, out: Path) -> Found:
    """G1 to G6: the parts of gpu.sh, which writes to `out`; without a GPU a note that says so."""
    if not torch.cuda.is_available():
        return Found(notes=["G1 to G6 are left out: this machine has no GPU"])
    done = subprocess.run(["bash", str(HERE / "gpu.sh"), str(out)], check=False, stdout=subprocess.DEVNULL)
    found = Found(notes=(out / "summary.txt").read_text().splitlines())
    if done.returncode:
        found.wrong.append("a part of gpu.sh failed or ran out of time")
    for config in GPU_CONFIGS:
        reports = dict(gpu_steps(out / "session.tgz", config))
        for name, mine in reports.items():
            ours = reports.get("engine-compile" if name.endswith("-compile") else "engine", mine)
            pairs = zip(ours["losses"], mine["losses"], strict=True)
            found.lines.append(
                Line(
                    *(f"{row} {config}", name, mine["seconds"], "ms"),
                    ratio=ours["seconds"] / mine["seconds"],
                    memory_bytes=mine["peak_memory_bytes"],
                    loss_difference=max(abs(a - b) / abs(a) for a, b in pairs),
                    counted=f"MFU {mine['mfu']:.1%}, {mine['tokens_per_second']:,.0f} tokens/s",
                )
            )
    return found


def gpu_steps(archive: Path, config: str) -> list[tuple[str, dict[str, Any]]]:
    """The reports of the contenders that ran."""
    with tarfile.open(archive) as files:
        names = {name.removeprefix("./"): name for name in files.getnames()}
        found = [(each, names.get(f"step-{config}-{each}.json")) for each in CONTENDERS]
        return [(each, json.load(files.extractfile(name) or sys.stdin)) for each, name in found if name is not None]
