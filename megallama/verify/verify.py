"""`megallama verify`: the user's run, shrunk, trained for a few steps at many layouts, all held against one process.

Nothing is special about these trainings: they run the loop of every run and are judged by what every run leaves, its
metrics and its checkpoints.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from megallama.config.schema import RunConfig, RunSection
from megallama.corpus.building.build import build_dataset
from megallama.errors import NotFiniteError, UserError
from megallama.layout.check import check_training
from megallama.layout.names import ONE_PROCESS, Layout
from megallama.model.init import initialise
from megallama.model.llama import Llama
from megallama.parallel.launch import Launch
from megallama.parallel.spawn import RankFailedError, run_ranks
from megallama.train.start import start
from megallama.verify.compare import BOUNDS, FP8, Difference, Trace, compare, read_trace, train_losses, worst_difference
from megallama.verify.shrink import GLOBAL_BATCH_SIZE, LAYERS, shrink

Plant = Callable[[], None]


@dataclass(frozen=True)
class Verdict:
    """What became of one layout."""

    layout: Layout
    losses: list[float]
    difference: Difference | None
    resumed: float | None
    """The worst relative difference of losses after it resumed one process's checkpoint, and one process its own."""
    failures: list[str]
    """Why it does not pass; empty when it does."""


@dataclass(frozen=True)
class Reference:
    """One process: its run, what it left, and the weights it began with."""

    config: RunConfig
    trace: Trace
    initial: dict[str, Tensor]


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
    resume: bool = False,
    plant: Plant | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Train at one process and at each of `layouts`, and compare; UserError before that for one that cannot run.

    With `resume`, each layout also continues one process's checkpoint, and one process that of the layout.

    `plant`, an importable function, is called on every rank of the layouts, also where they resume, but not in the
    reference: with a planted bug the report must not pass.
    """
    if dtype not in BOUNDS:
        raise UserError(f"--dtype={dtype} is not a type to verify in; use {' or '.join(BOUNDS)}")
    with tempfile.TemporaryDirectory(prefix="megallama-verify-") as name:
        folder = Path(name)
        batch = lcm(GLOBAL_BATCH_SIZE, *(layout.dp * layout.micro_batches for layout in layouts))
        layers = layers_for(layouts)
        alone = shrink(config, folder / "one process", write_dataset(folder), steps, dtype, layers, batch)
        runs = {layout.name: (layout, _spread(alone, layout)) for layout in layouts}
        progress("one process")
        _train(alone, ONE_PROCESS, None)
        reference = Reference(alone, read_trace(alone), initial_weights(alone))
        verdicts = []
        for name, (layout, run) in runs.items():
            progress(name)
            verdicts.append(_judge(run, layout, reference, plant, resume=resume))
        return Report(reference.trace, verdicts)


def layers_for(layouts: Sequence[Layout]) -> int:
    """Decoder layers of the shrunk run: the sum of a split, else one more than the most stages, so that none is even.

    UserError for layouts of which no number suits both.
    """
    split = next((layout for layout in layouts if layout.split), None)
    if split is None:
        return max(LAYERS, *(layout.stages + (layout.pp > 1) for layout in layouts))
    layers = sum(split.split)
    for other in layouts:
        needs = str(sum(other.split)) if other.split else f"{other.stages} or more"
        if layers < other.stages or (other.split and sum(other.split) != layers):
            raise UserError(
                f"layout {split.name} needs {layers} layers and layout {other.name} needs {needs}, and the shrunk run "
                "has one number of layers for all; verify them by two commands, or write splits of the same sum"
            )
    return layers


def write_dataset(folder: Path) -> Path:
    """Short documents of bytes: words in an order drawn once, the same on every machine, so that figures compare."""
    text = (
        "a all an and are as at be but by can come day do first for from get give go have he her him his how if in to "
        "is it its know like look make man many more my new no not of on one only or other our out people see she so "
        "some than that the their them then there these they think this time to two up use very was way we well were "
        "what when which who will with would year you"
    )
    words, random = text.split(), Random(0)
    folder.joinpath("lines").mkdir()
    for number in range(400):
        line = " ".join(random.choices(words, k=random.randint(3, 18)))
        folder.joinpath("lines", f"{number:03d}.txt").write_text(line)
    build_dataset([str(folder / "lines")], str(folder / "data"), "bytes", workers=1)
    return folder / "data"


def initial_weights(config: RunConfig) -> dict[str, Tensor]:
    """The weights that training starts from, whole, by logical name."""
    model = Llama(config.model)
    held = model.shard_slices
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
    tree = alone.model_dump()
    tree["run"]["dir"] = str(Path(alone.run.dir).with_name(layout.name))
    layout.apply(tree)
    config = RunConfig.model_validate(tree)
    try:
        check_training(config, layout.world_size)
    except UserError as error:
        raise UserError(f"layout {layout.name}, of the shrunk run: {error}") from None
    return config


def _judge(config: RunConfig, layout: Layout, reference: Reference, plant: Plant | None, *, resume: bool) -> Verdict:
    try:
        hashes = _train(config, layout, plant)
        resumed = _resume_both_ways(config, layout, reference, plant) if resume else None
    except RankFailedError as error:
        return Verdict(layout, [], None, None, [str(error).strip().splitlines()[-1]])
    trace = read_trace(config)
    difference = compare(trace, reference.trace, reference.initial)
    bounds = BOUNDS[config.train.dtype] if config.train.matmul == "dtype" else FP8
    failures = difference.beyond(bounds) + unequal_copies(layout, hashes)
    if resumed is not None and not resumed <= bounds.loss:
        failures.append("resumed")
    return Verdict(layout, trace.losses, difference, resumed, failures)


def _resume_both_ways(config: RunConfig, layout: Layout, reference: Reference, plant: Plant | None) -> float:
    """The worst relative difference of losses when each goes on from what the other saved."""
    here = _resume(config, reference.config, layout, plant)
    there = _resume(reference.config, config, ONE_PROCESS, None)
    expected = reference.trace.losses[-len(here) :]
    return worst_difference([*here, *there], [*expected, *expected])


def _resume(config: RunConfig, saved: RunConfig, layout: Layout, plant: Plant | None) -> list[float]:
    """Losses of `config` at `layout`, continued from the checkpoint that `saved` made in the middle."""
    folder = Path(tempfile.mkdtemp(dir=Path(config.run.dir).parent))
    steps = config.train.steps
    assert isinstance(steps, int)
    name = f"step_{(steps + 1) // 2:08d}"
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / name).symlink_to(Path(saved.run.dir) / "checkpoints" / name)
    checkpoint = config.checkpoint.model_copy(update={"resume": "must", "every": 0})
    again = config.model_copy(update={"run": RunSection(dir=str(folder)), "checkpoint": checkpoint})
    run_ranks(resume_rank, layout.world_size, again, plant)
    losses = train_losses(folder)
    return losses + [math.nan] * (steps - (steps + 1) // 2 - len(losses))


def resume_rank(launch: Launch, config: RunConfig, plant: Plant | None) -> None:
    """One rank that continues a checkpoint: what it refuses to train on leaves steps without a loss."""
    with suppress(NotFiniteError):
        train_rank(launch, config, plant)


def _train(config: RunConfig, layout: Layout, plant: Plant | None) -> list[dict[str, str]]:
    return run_ranks(train_rank, layout.world_size, config, plant)


def train_rank(launch: Launch, config: RunConfig, plant: Plant | None) -> dict[str, str]:
    """One rank: train, and return a hash of each parameter it holds whole."""
    if plant is not None:
        plant()
    model = start(config, launch).model
    held = model.shard_slices
    return {
        f"{'copy ' if all(p.size == p.shape for p in held[name]) else 'shard '}{name}": _hash(parameter)
        for name, parameter in model.named_parameters()
        if parameter.numel()  # ZeRO 3 leaves large parameters cut
    }


def unequal_copies(layout: Layout, hashes: Sequence[dict[str, str]]) -> list[str]:
    """Parameters that should be the same bits on several ranks and are not."""
    seen: dict[tuple[str, int], str] = {}
    unequal = set()
    for rank, mine in enumerate(hashes):
        for name, value in mine.items():
            place = (name, -1 if name.startswith("copy ") else layout.coordinate(rank, "tp"))
            if seen.setdefault(place, value) != value:
                unequal.add(name)
    return [f"{name} differs between ranks" for name in sorted(unequal)]


def _hash(parameter: Tensor) -> str:
    return hashlib.sha256(parameter.detach().view(torch.uint8).numpy().tobytes()).hexdigest()
