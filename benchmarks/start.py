"""What a start takes: memory, seconds for the initial weights, and process groups against the number of ranks.

Memory is counted tensor by tensor on ranks that meet over gloo, beside the bytes of state that a rank holds from its
first step to its last; and on one rank of 512 that trains a 70B model at ZeRO 3, at its true widths and two layers,
whose peers are not there. Initial weights are drawn at the widths of an 8B model at tp 2. Groups are made as training
makes them, and as a launcher would that makes every group on every rank. Runs of a tiny model are launched by torchrun.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
import torch.distributed as dist
from counted.live_bytes import LiveBytes

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.layout.topology import AxisName, Topology
from megallama.model.init import initialise_owned
from megallama.parallel import mesh
from megallama.parallel.join import join
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.shards import ShardSlice
from megallama.parallel.spawn import run_ranks
from megallama.plan.memory.ledger import held_rows, rank_bytes
from megallama.plan.memory.state import GIB, rank_parameters

MODEL = ["vocab_size=8001", "hidden_size=384", "intermediate_size=1024", "num_hidden_layers=8"]
"""20 million parameters, with six heads."""
LARGE = ["parallel.tensor=1", "parallel.pipeline=1", "zero.stage=3", "train.recompute=full", "train.device=cpu"]
LARGE_RANKS = 512
MOST = 1.3
"""Of the state of a rank at ZeRO 3."""
CPU = torch.device("cpu")
AXES: tuple[tuple[AxisName, ...], ...] = (("tp",), ("pp",), ("dp", "cp"), ("pp", "tp"))


def started_bytes(launch: Launch, configs: Sequence[RunConfig]) -> list[int]:
    """The most bytes that this rank holds until it has its initial weights."""
    launch.prepare(CPU)
    from megallama.train.run import build_model, draw_weights  # bring deepspeed, which looks for a device

    mesh = build_mesh(Topology(dp=launch.world_size), launch, CPU)
    found = []
    for config in configs:
        with LiveBytes() as live, warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            model, engine = build_model(config, mesh)
            draw_weights(config, model, engine)
        found.append(live.peak)
    return found


def memory(ranks: int) -> dict[str, dict[str, float]]:
    """By stage: bytes per parameter at the fullest moment of a start, and of the state."""
    words = [*(f"model.{word}" for word in [*MODEL, "num_attention_heads=6", "num_key_value_heads=6"])]
    words += [
        "train.device=cpu",
        "train.dtype=bf16",
        "zero.bucket_elements=100000",
        "train.micro_batch_size=1",
        f"train.global_batch_size={ranks}",
    ]
    configs = [load_config("configs/debug.yaml", [*words, f"zero.stage={stage}"]) for stage in (1, 2, 3)]
    every = run_ranks(started_bytes, ranks, configs)
    found = {}
    for number, config in enumerate(configs):
        (rank,) = rank_parameters(config)
        state = sum(row.size for row in held_rows(config, rank, ranks))
        peak = max(one[number] for one in every)
        found[f"ZeRO {config.zero.stage}"] = {
            "peak": peak / rank.total,
            "state": state / rank.total,
            "ratio": peak / state,
        }
    return found


def large_rank(layers: int) -> dict[str, float]:
    """GiB that one rank of 512 holds in its start, and in training by the plan."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    config = load_config("configs/70b.yaml", [*LARGE, f"model.num_hidden_layers={layers}"])
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=LARGE_RANKS)
    (peak,) = started_bytes(Launch(world_size=LARGE_RANKS, local_world_size=8), [config])
    return {"peak": peak / GIB, "planned": max(rank_bytes(config, LARGE_RANKS)) / GIB}


def drawing(threads: int, rows: int) -> float:
    """Elements per second of the initial weights of an 8B model at tp 2: so many rows of its MLP's matrices."""
    piece = ShardSlice("mlp.gate_proj.weight", (14336, 4096), (0, 0), (rows, 4096))
    flat = torch.ones(rows * 4096)
    began = time.perf_counter()
    owned, held = [("weight", 0, flat)], {"weight": (piece,)}
    initialise_owned(owned, held, dtype=torch.bfloat16, threads=threads, seed=1, num_layers=32)
    return flat.numel() / (time.perf_counter() - began)


def grouping(launch: Launch, everywhere: bool) -> tuple[int, float]:
    """Groups that this rank makes of a mesh of tp 2 and pp 2, and the seconds that it takes."""
    topology = Topology(pp=2, dp=launch.world_size // 4, tp=2)
    join(launch, CPU)
    dist.barrier()
    began = time.perf_counter()
    with patch.object(dist, "new_group", side_effect=dist.new_group) as made:
        if everywhere:
            for axes in AXES:
                for ranks in sorted({tuple(topology.peers(rank, axes)) for rank in range(launch.world_size)}):
                    dist.new_group(ranks)
        else:
            with patch.object(mesh, "of_all", return_value=()):  # the names of hosts, which are no groups
                build_mesh(topology, launch, CPU)
    taken = time.perf_counter() - began
    dist.barrier()  # rank 0 has the store in which the others still meet
    return made.call_count, taken


def launching(ranks: int, folder: Path) -> float:
    """Seconds from the command to the end of the first step of so many ranks, of a model of 131,520 parameters."""
    (folder / "text.txt").write_text("Every rank imports torch and deepspeed before it meets the others.\n" * 100)
    corpus, batch = folder / "corpus", f"train.global_batch_size={ranks}"
    build = [sys.executable, "-m", "megallama", "data", "build", str(folder / "text.txt"), "--output", str(corpus)]
    subprocess.run([*build, "--tokenizer", "bytes"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    words = [f"data.path={corpus}", f"run.dir={folder / 'run'}", "train.device=cpu", "train.micro_batch_size=1", batch]
    words += ["train.steps=1", "schedule.warmup_steps=0", "data.validation_fraction=0"]
    words += ["evaluation.every=0", "checkpoint.every=0"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += ["launch/pretrain.py", "--config", "configs/debug.yaml", *words]
    began = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as run:
        said = run.stdout or ()
        taken = next((time.perf_counter() - began for line in said if line.startswith("step 1/1")), math.nan)
    return taken


def main() -> int:
    """Measure and print; the exit code says whether a start at ZeRO 3 keeps its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64], help="Ranks whose groups are timed.")
    parser.add_argument("--launched", type=int, nargs="*", default=[1, 2, 4, 8], help="Ranks that torchrun starts.")
    parser.add_argument("--copies", type=int, default=4, help="Data-parallel ranks whose memory is counted.")
    parser.add_argument("--layers", type=int, default=2, help="Layers of the rank of 512; 0 leaves it out.")
    parser.add_argument("--rows", type=int, default=14336, help="Rows of a matrix to draw.")
    parser.add_argument("--json", action="store_true", help="Print a dictionary for scripts.")
    options = parser.parse_args()
    processors = len(os.sched_getaffinity(0))
    report: dict[str, object] = {"memory": (counted := memory(options.copies))}
    print_unless(options.json, f"memory of a start, bf16, dp {options.copies}, bytes per parameter")
    for stage, row in counted.items():
        print_unless(options.json, f"  {stage}  {row['peak']:.2f}, state {row['state']:.2f}: {row['ratio']:.2f} times")
    if options.layers:
        with get_context("spawn").Pool(1) as pool:  # its process group is not this process's
            report["large"] = large = pool.apply(large_rank, (options.layers,))
        words = f"one rank of {LARGE_RANKS}, 70B at ZeRO 3, {options.layers} layers"
        print_unless(options.json, f"{words}: {large['peak']:.2f} GiB, planned for training {large['planned']:.2f}")
    report["drawn"] = drawn = {threads: drawing(threads, options.rows) for threads in sorted({1, processors})}
    for threads, rate in drawn.items():
        words = f"initial weights, {threads} threads: {rate / 1e6:.0f} million a second"
        print_unless(options.json, f"{words}, {4.015e9 / rate:.0f} s for 8B at tp 2")
    report["groups"] = groups = {}
    for ranks in options.ranks:
        for name, everywhere in (("own", False), ("everywhere", True)):
            found = run_ranks(grouping, ranks, everywhere, timeout=600)
            groups[f"{ranks} {name}"] = row = {"made": max(n for n, _ in found), "seconds": max(s for _, s in found)}
            print_unless(options.json, f"groups of {ranks} ranks, {name}: {row['made']} a rank, {row['seconds']:.2f} s")
    report["launched"] = launched = {}
    for ranks in options.launched:
        with TemporaryDirectory() as folder:
            launched[str(ranks)] = launching(ranks, Path(folder))
        print_unless(options.json, f"from the command to the first step of {ranks} ranks: {launched[str(ranks)]:.1f} s")
    if options.json:
        print(json.dumps(report, indent=2))
    return int(counted["ZeRO 3"]["ratio"] > MOST)


def print_unless(quiet: bool, line: str) -> None:
    """Print a line as it is measured."""
    if not quiet:
        print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
