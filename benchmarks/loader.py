"""Time the order of samples and the loader: `python benchmarks/loader.py [--sources 1000] [--json]`.

Tokens per second of the loader beside what a training step of a config consumes; the start of a mixture of many small
datasets at a far position, with few files allowed; a sample of a permutation of 10^12; and the build of an order.
Datasets are generated. Starts are the fastest of three, as other programs may run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.data.blend import Pattern, period_counts
from megallama.data.indexed import IndexedWriter, token_dtype
from megallama.data.loader import open_data
from megallama.data.sampler import Sampler
from megallama.layout.topology import Topology

FIVE = {"web": 0.6, "books": 0.15, "code": 0.1, "wikipedia": 0.1, "academic": 0.05}
POSITION = 10**9
OPEN_FILES = 256


def write_dataset(prefix: Path, documents: int, draw: np.random.Generator) -> None:
    """Documents of 200 to 500 random bytes."""
    dtype, sizes = token_dtype(257), draw.integers(200, 500, documents).astype("<i4")
    writer = IndexedWriter(str(prefix), dtype)
    writer.add(draw.integers(0, 256, sizes.sum()).astype(dtype), sizes)
    writer.close()


def mixture_of(config: RunConfig, weights: dict[Path, float]) -> RunConfig:
    """The run on the datasets of those prefixes."""
    tree = config.model_dump()
    sources = [{"path": str(prefix), "weight": weight} for prefix, weight in weights.items()]
    tree["data"] |= {"path": None, "mixture": sources, "tokenizer": "bytes", "validation_fraction": 0.01}
    return RunConfig.model_validate(tree)


def loader_speed(config: RunConfig, folder: Path) -> float:
    """Tokens per second of one rank that reads all micro-batches of the run's steps, one after the other."""
    draw = np.random.default_rng(0)
    for name in FIVE:
        write_dataset(folder / name, 2000, draw)
    data = open_data(mixture_of(config, {folder / name: weight for name, weight in FIVE.items()}), Topology(), 0)
    position, begin = 0, time.perf_counter()
    while time.perf_counter() - begin < 3.0:
        data.train.step(position)
        position += config.train.global_batch_size
    return position * config.data.sequence_length / (time.perf_counter() - begin)


def model_speed(config: str) -> float:
    """Tokens per second of a training step of the config in one process."""
    step = Path(__file__).with_name("step.py")
    command = [sys.executable, str(step), config, "--contenders", "engine", "--steps", "5", "--rounds", "3", "--json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return float(report["contenders"]["engine"]["tokens_per_second"])


def far_start(config: RunConfig, folder: Path, sources: int) -> dict[str, float]:
    """Seconds until the step at POSITION of a mixture of so many sources is read, and files open after it."""
    draw = np.random.default_rng(1)
    prefixes = [folder / f"source{number}" for number in range(sources)]
    for prefix in prefixes:
        write_dataset(prefix, 20, draw)
    weights = 0.1 + draw.random(sources)
    run = mixture_of(config, dict(zip(prefixes, weights.tolist(), strict=True)))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, limits[1]))
    taken, processor = [], []
    for _ in range(3):
        begin, spent = time.perf_counter(), time.process_time()
        data = open_data(run, Topology(), 0)
        data.train.step(POSITION)
        taken.append(time.perf_counter() - begin)
        processor.append(time.process_time() - spent)
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    opened = len(os.listdir("/proc/self/fd"))
    return {"seconds": min(taken), "processor_seconds": min(processor), "open_files": opened}


def each(function: Callable[[int], object], numbers: list[int]) -> float:
    """Seconds of a call, the fastest of five times all numbers."""
    found = []
    for _ in range(5):
        begin = time.perf_counter()
        for number in numbers:
            function(number)
        found.append((time.perf_counter() - begin) / len(numbers))
    return min(found)


def pattern_seconds(weights: list[float]) -> float:
    """Processor seconds to build the order of such weights, the fastest of three."""
    found = []
    for _ in range(3):
        begin = time.process_time()
        Pattern(period_counts(weights))
        found.append(time.process_time() - begin)
    return min(found)


def measured(config_path: str, sources: int) -> dict[str, Any]:
    """All of the above."""
    config, draw = load_config(config_path), random.Random(0)
    numbers = [draw.randrange(10**12) for _ in range(2000)]
    with tempfile.TemporaryDirectory() as folder:
        loader, start = loader_speed(config, Path(folder)), far_start(config, Path(folder), sources)
    model = model_speed(config_path)
    pattern = Pattern(period_counts([*FIVE.values()]))
    return {
        "loader_tokens_per_second": loader,
        "model_tokens_per_second": model,
        "loader_over_model": loader / model,
        "start": {"sources": sources, "position": POSITION, **start},
        "sample_of_1e12_microseconds": 1e6 * each(Sampler(10**12, 1234).window, numbers),
        "source_of_a_sample_microseconds": 1e6 * each(pattern.locate, numbers),
        "order_of_five_decimals_seconds": pattern_seconds([*FIVE.values()]),
        "longest_order_seconds": pattern_seconds([0.1 + draw.random() for _ in range(1000)]),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("--sources", type=int, default=1000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found = measured(options.config, options.sources)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    start = found["start"]
    print(f"loader {found['loader_tokens_per_second']:,.0f} tokens/s, model {found['model_tokens_per_second']:,.0f}")
    print(f"loader / model: {found['loader_over_model']:.0f}")
    print(
        f"start at sample {POSITION:,} of {start['sources']:,} datasets: {start['seconds']:.2f} s, "
        f"{start['processor_seconds']:.2f} of a processor; {start['open_files']} files open, of {OPEN_FILES} allowed"
    )
    print(f"a sample of 10^12: {found['sample_of_1e12_microseconds']:.1f} us")
    print(f"the source of a sample: {found['source_of_a_sample_microseconds']:.1f} us")
    print(f"order of five decimals: {1000 * found['order_of_five_decimals_seconds']:.2f} ms")
    print(f"longest order: {found['longest_order_seconds']:.2f} s")


if __name__ == "__main__":
    main()
