"""Time the check that all ranks run the same: `python benchmarks/agreement.py [--ranks 8] [--rounds 20]`.

Ranks are processes on this machine, over gloo. Also timed: a bare all-reduce of the same size, and how long the ranks
take to meet.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.corpus.building.build import build_dataset
from megallama.data.loader import open_data
from megallama.layout.topology import Topology
from megallama.parallel.agreement import check_same, facts_of
from megallama.parallel.join import join
from megallama.parallel.launch import Launch
from megallama.parallel.spawn import run_ranks

MILLISECOND = 1e-3


def measure(launch: Launch, config: RunConfig, rounds: int) -> dict[str, float]:
    """Milliseconds of each part on this rank: medians, where a part can be repeated."""
    device = torch.device("cpu")
    data = open_data(config, Topology(dp=launch.world_size), launch.rank)
    began = time.perf_counter()
    join(launch, device)
    met = time.perf_counter() - began
    facts, collecting, agreeing, bare = {}, [], [], []
    words = torch.zeros(16, dtype=torch.int64)
    for _ in range(rounds):
        began = time.perf_counter()
        facts = facts_of(config, data.contents)
        collected = time.perf_counter()
        dist.barrier()  # ranks are timed together, not how far they are apart
        start = time.perf_counter()
        check_same(facts, device)
        agreed = time.perf_counter()
        dist.barrier()
        again = time.perf_counter()
        dist.all_reduce(words)
        bare.append(time.perf_counter() - again)
        collecting.append(collected - began)
        agreeing.append(agreed - start)
    return {
        "meeting": met / MILLISECOND,
        "first collecting": collecting[0] / MILLISECOND,
        "collecting": statistics.median(collecting) / MILLISECOND,
        "first agreement": agreeing[0] / MILLISECOND,
        "agreement": statistics.median(agreeing) / MILLISECOND,
        "bare all-reduce": statistics.median(bare) / MILLISECOND,
    }


def main() -> None:
    """Measure and print the slowest rank of each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text, corpus = Path(folder) / "text.jsonl", Path(folder) / "corpus"
        text.write_text("\n".join(json.dumps({"text": f"number {number} " * 20}) for number in range(10_000)))
        build_dataset([str(text)], str(corpus), "bytes", workers=1)
        batch = f"train.global_batch_size={8 * options.ranks}"
        config = load_config("configs/debug.yaml", [f"data.path={corpus}", batch])
        found = run_ranks(measure, options.ranks, config, options.rounds)
    print(f"{options.ranks} ranks over gloo, the slowest of them, median of {options.rounds} rounds")
    for part in found[0]:
        print(f"{part:>18} {max(rank[part] for rank in found):8.2f} ms")


if __name__ == "__main__":
    main()
