"""Row C4: two pipeline stages over gloo under 1F1B, beside torch's schedule and DeepSpeed's engine.

All contenders live in the same two processes of one thread each, cut the model at the same layer, hold the same weights
and take turns. A step of m micro-batches should take (m + p - 1) times what the slower stage takes for one (arXiv
2104.04473, section 2.2): what is beyond m is the bubble. Updates are not in the times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from contenders.plain_llama import PlainLlama, fill, whole_weights
from contenders.steps import adamw, initialised_llama, random_batches
from rows.table import Aim, Found, Line, median_ratio, spread
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.nn import functional as F

from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch
from megallama.layout.stages import stages
from megallama.layout.topology import Topology
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ParallelMesh, build_mesh
from megallama.parallel.spawn import run_ranks

STAGES = 2
LOSS_TOLERANCE = 1e-4
OURS = "ours"


@dataclass(frozen=True)
class Contender:
    """A stage with its optimizer on one rank."""

    forward_backward: Callable[[list[MicroBatch]], float]
    """Of all micro-batches of a step; their mean loss where the last stage is."""
    update: Callable[[], object]


@dataclass(frozen=True)
class Turns:
    """What a contender did with one number of micro-batches, as the last stage sees it."""

    seconds: list[float]
    """Of each round, the update left out."""
    processor_seconds: list[float]
    """Of this rank."""
    losses: list[float]


def row(name: str, config: RunConfig, micro_batches: Sequence[int], rounds: int) -> Found:
    """All contenders of C4."""
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"pipeline": STAGES})})
    turns, failed = run_ranks(measure, STAGES, config, micro_batches, rounds, timeout=900.0)[-1]
    found = Found(notes=[f"{contender} is left out: {why}" for contender, why in failed.items()])
    contenders = list(dict.fromkeys(contender for contender, _ in turns))
    few, many = min(micro_batches), max(micro_batches)
    for contender in contenders:
        taken = {m: median(turns[contender, m].seconds) for m in micro_batches}
        each = (taken[many] - taken[few]) / (many - few)
        for m in micro_batches:
            mine, reference = turns[contender, m], turns[OURS, m]
            differs = max(abs(a - b) / abs(a) for a, b in zip(reference.losses, mine.losses, strict=True))
            if not differs <= LOSS_TOLERANCE:
                found.wrong.append(f"the losses of {contender} with {m} differ from ours by {differs:.1e}")
            bubble = f"bubble {taken[m] / (m * each) - 1:.2f}, ideal {(STAGES - 1) / m:.2f}; "
            bubble += f"{median(mine.processor_seconds):.2f} s of a processor"
            ratio = median_ratio(reference.seconds, mine.seconds)
            of_ideal = (m + STAGES - 1) * each / taken[m]
            label, apart = f"{contender}, m = {m}", spread(mine.seconds)
            found.lines.append(Line(name, label, taken[m], "ms", apart, ratio, of_ideal, None, differs, bubble))
        if contender != OURS:
            pairs = [(turns[OURS, m], turns[contender, m]) for m in micro_batches]
            times = median(median_ratio(one.seconds, other.seconds) for one, other in pairs)
            spent = median(median_ratio(one.processor_seconds, other.processor_seconds) for one, other in pairs)
            found.aims.append(Aim(f"time ours / {contender}, the median over m", times, 1.0))
            found.notes.append(f"processor time of the last stage, ours / {contender}: {spent:.3f}")
    found.notes.append(
        "floor: (m + p - 1) micro-batches of the slower stage, each of which takes as long as one more of them adds"
    )
    return found


def measure(
    launch: Launch, config: RunConfig, micro_batches: Sequence[int], rounds: int
) -> tuple[dict[tuple[str, int], Turns], dict[str, str]]:
    """Of every contender and number of micro-batches, as one rank sees it; and why others are left out."""
    launch.prepare(torch.device("cpu"))
    mesh = build_mesh(Topology(pp=STAGES), launch, torch.device("cpu"))
    makers = {OURS: ours, "torch Schedule1F1B": of_torch, "DeepSpeed PipelineEngine": of_deepspeed}
    made, failed = {}, {}
    for name, make in makers.items():
        try:
            made[name] = make(config, mesh)
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
    batches = {name: drawn(config) for name in made}
    found = {(name, m): Turns([], [], []) for name in made for m in micro_batches}
    for number in range(rounds + 1):
        # Back and forth: a machine that slows down steadily favours no one. The first round warms up.
        for name in list(made) if number % 2 == 0 else list(reversed(made)):
            for m in micro_batches:
                inputs = [next(batches[name]) for _ in range(m)]
                dist.barrier()
                began, spent = time.perf_counter(), time.process_time()
                loss = made[name].forward_backward(inputs)
                spent = time.process_time() - spent
                dist.barrier()
                if number:
                    found[name, m].seconds.append(time.perf_counter() - began)
                    found[name, m].processor_seconds.append(spent)
                found[name, m].losses.append(loss)
                made[name].update()
    return found, failed


def drawn(config: RunConfig) -> Iterator[MicroBatch]:
    """One micro-batch after the other."""
    return (batch for batches in random_batches(config) for batch in batches)


def ours(config: RunConfig, mesh: ParallelMesh) -> Contender:
    """megallama's pipeline and engine."""
    from megallama.train.run import build_model, draw_weights

    model, engine = build_model(config, mesh)
    draw_weights(config, model, engine)

    def forward_backward(batches: list[MicroBatch]) -> float:
        return float(engine.forward_backward(batches, torch.tensor(1.0 / count(batches))))

    return Contender(forward_backward, lambda: engine.step(config.optimizer.lr))


def count(batches: list[MicroBatch]) -> int:
    return sum(batch.labels.numel() for batch in batches)


def stage_of(config: RunConfig, stage: int) -> PlainLlama:
    """The layers that ours has there, with the same weights."""
    model = PlainLlama(config.model, stages(config)[stage].layers, config.data.sequence_length)
    return fill(model, whole_weights(initialised_llama(config)))


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Over the positions of a micro-batch."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def of_torch(config: RunConfig, mesh: ParallelMesh) -> Contender:
    """torch's own stage and schedule."""
    model = stage_of(config, mesh.pp.rank)
    optimizer = adamw(list(model.parameters()), config)
    schedules: dict[int, Schedule1F1B] = {}

    def forward_backward(batches: list[MicroBatch]) -> float:
        if len(batches) not in schedules:
            stage = PipelineStage(model, mesh.pp.rank, STAGES, torch.device("cpu"), group=mesh.pp.group)
            schedules[len(batches)] = Schedule1F1B(stage, len(batches), loss_fn=mean_loss)
        schedule, losses = schedules[len(batches)], list[Tensor]()
        if mesh.pp.rank == 0:
            schedule.step(torch.cat([batch.tokens for batch in batches]), return_outputs=False)
            return 0.0
        labels = torch.cat([batch.labels for batch in batches])
        schedule.step(target=labels, losses=losses, return_outputs=False)
        return float(torch.stack(losses).mean())

    return Contender(forward_backward, partial(update, model, optimizer, config))


def update(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig) -> None:
    """Clip and step."""
    clip(list(model.parameters()), config.optimizer.clip)
    optimizer.step()
    optimizer.zero_grad()


def clip(parameters: list[nn.Parameter], most: float) -> None:
    """By the norm over both stages."""
    square = torch.stack([p.grad.square().sum() for p in parameters if p.grad is not None]).sum()
    dist.all_reduce(square)
    nn.utils.clip_grads_with_norm_(parameters, most, square.sqrt())


def of_deepspeed(config: RunConfig, mesh: ParallelMesh) -> Contender:
    """Its PipelineEngine, each of whose two layers is a stage.

    Its schedule ends with the update, which is held back and done apart; clipping is that of the others, as its own
    counts what stages share.
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.schedule import OptimizerStep

    parts = [stage_of(config, stage) for stage in range(STAGES)]
    module = PipelineModule(parts, num_stages=STAGES, loss_fn=mean_loss, partition_method="uniform")
    settings = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1_000_000,
    }
    weights = list(module.parameters())
    optimizer = adamw(weights, config)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    step = engine._INSTRUCTION_MAP[OptimizerStep]
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, OptimizerStep: lambda *_, **__: None}

    def forward_backward(batches: list[MicroBatch]) -> float:
        engine.set_train_batch_size(config.train.micro_batch_size * len(batches))
        return float(engine.train_batch(iter([(batch.tokens, batch.labels) for batch in batches])))

    def update() -> None:
        clip(weights, config.optimizer.clip)
        step(engine)

    return Contender(forward_backward, update)
