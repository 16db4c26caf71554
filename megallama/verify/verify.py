"""`megallama verify`: the user's run, shrunk, trained for a few steps at many layouts, all held against one process.

Nothing is special about these trainings: they run the loop of every run and are judged by what every run leaves, its
metrics and its checkpoints.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from megallama.config.check import check_config
from megallama.config.schema import RunConfig
from megallama.data.build import build_dataset
from megallama.errors import UserError
from megallama.model.llama import Llama
from megallama.parallel.init import initialise
from megallama.parallel.mesh import Launch
from megallama.parallel.spawn import RankFailedError, run_ranks
from megallama.parallel.topology import Topology
from megallama.start import start
from megallama.verify.compare import BOUNDS, Difference, Trace, compare, read_trace
from megallama.verify.layout import ONE_PROCESS, Layout
from megallama.verify.shrink import GLOBAL_BATCH_SIZE, shrink

Plant = Callable[[], None]


@dataclass(frozen=True)
class Verdict:
    """What became of one layout."""

    layout: Layout
    losses: list[float]
    difference: Difference | None
    failures: list[str]
    """Why it does not pass; empty when it does."""


@dataclass(frozen=True)
class Report:
    """All layouts of one run."""

    reference: Trace
    verdicts: list[Verdict]

    @property
    def passed(self) -> bool:
        """Whether every layout gave the answer of one process."""
        return not any(verdict.failures for verdict in self.verdicts)


def verify(
    config: RunConfig,
    layouts: Sequence[Layout],
    *,
    steps: int = 5,
    dtype: str = "fp32",
    plant: Plant | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Train at one process and at each of `layouts`, and compare; UserError before that for one that cannot run.

    `plant`, an importable function, is called on every rank of the layouts but not in the reference: with a planted
    bug the report must not pass.
    """
    if dtype not in BOUNDS:
        raise UserError(f"--dtype={dtype} is not a type to verify in; use {' or '.join(BOUNDS)}")
    with tempfile.TemporaryDirectory(prefix="megallama-verify-") as name:
        folder = Path(name)
        alone = shrink(config, folder / "one process", write_dataset(folder), steps, dtype)
        runs = {layout.name: (layout, _spread(alone, layout)) for layout in layouts}
        progress("one process")
        _train(alone, ONE_PROCESS, None)
        reference = read_trace(alone)
        initial = initial_weights(alone)
        verdicts = []
        for name, (layout, run) in runs.items():
            progress(name)
            verdicts.append(_judge(run, layout, reference, initial, plant))
        return Report(reference, verdicts)


def write_dataset(folder: Path) -> Path:
    """Short documents of bytes: products, the same on every machine, so that figures can be compared."""
    folder.joinpath("lines").mkdir()
    for a, b in product(range(2, 30), repeat=2):
        folder.joinpath("lines", f"{a:02d}_{b:02d}.txt").write_text(f"{a} times {b} is {a * b}")
    build_dataset([str(folder / "lines")], str(folder / "data"), "bytes", workers=1)
    return folder / "data"


def initial_weights(config: RunConfig) -> dict[str, Tensor]:
    """The weights that training starts from, whole, by logical name."""
    model = Llama(config.model)
    held = model.logical_pieces()
    initialise(
        model,
        held,
        seed=config.train.seed,
        num_layers=config.model.num_hidden_layers,
        scheme=config.model.init,
        std=config.model.initializer_range,
    )
    dtype = torch.bfloat16 if config.train.dtype == "bf16" else torch.float32
    parameters = {name: parameter.detach().to(dtype).float() for name, parameter in model.named_parameters()}
    return {piece.name: piece.of(parameters[name]) for name, pieces in held.items() for piece in pieces}


def _spread(alone: RunConfig, layout: Layout) -> RunConfig:
    """The run of one process, at `layout`, in a folder beside its own. UserError for a layout that cannot run."""
    if GLOBAL_BATCH_SIZE % (layout.dp * layout.accumulation):
        raise UserError(
            f"layout {layout.name}: dp * accumulation = {layout.dp * layout.accumulation} does not divide the "
            f"shrunk batch of {GLOBAL_BATCH_SIZE}; use 1, 2, 4 or 8"
        )
    tree = alone.model_dump()
    tree["run"]["dir"] = str(Path(alone.run.dir).with_name(layout.name))
    for override in layout.overrides(GLOBAL_BATCH_SIZE):
        path, _, value = override.partition("=")
        section, key = path.split(".")
        tree[section][key] = value
    config = RunConfig.model_validate(tree)
    try:
        check_config(config, layout.world_size)
    except UserError as error:
        raise UserError(f"layout {layout.name}, of the shrunk run: {error}") from None
    return config


def _judge(
    config: RunConfig, layout: Layout, reference: Trace, initial: dict[str, Tensor], plant: Plant | None
) -> Verdict:
    try:
        hashes = _train(config, layout, plant)
    except RankFailedError as error:
        return Verdict(layout, [], None, [str(error).strip().splitlines()[-1]])
    trace = read_trace(config)
    difference = compare(trace, reference, initial)
    failures = difference.beyond(BOUNDS[config.train.dtype]) + unequal_copies(layout, hashes)
    return Verdict(layout, trace.losses, difference, failures)


def _train(config: RunConfig, layout: Layout, plant: Plant | None) -> list[dict[str, str]]:
    return run_ranks(train_rank, layout.world_size, config, plant)


def train_rank(launch: Launch, config: RunConfig, plant: Plant | None) -> dict[str, str]:
    """One rank: train, and return a hash of each parameter it holds whole."""
    if plant is not None:
        plant()
    model = start(config, launch)
    held = model.logical_pieces()
    return {
        f"{'copy ' if all(p.size == p.shape for p in held[name]) else 'shard '}{name}": _hash(parameter)
        for name, parameter in model.named_parameters()
        if parameter.numel()  # ZeRO 3 leaves large parameters cut
    }


def unequal_copies(layout: Layout, hashes: Sequence[dict[str, str]]) -> list[str]:
    """Parameters that should be the same bits on several ranks and are not."""
    topology = Topology(dp=layout.dp, tp=layout.tp)
    seen: dict[tuple[str, int], str] = {}
    unequal = set()
    for rank, mine in enumerate(hashes):
        for name, value in mine.items():
            place = (name, -1 if name.startswith("copy ") else topology.coordinate(rank, "tp"))
            if seen.setdefault(place, value) != value:
                unequal.add(name)
    return [f"{name} differs between ranks" for name in sorted(unequal)]


def _hash(parameter: Tensor) -> str:
    return hashlib.sha256(parameter.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
