"""Timelines: the lists are what training runs, and real stages that take known times wait as long as they say."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from megallama.cli import app
from megallama.config.load import load_config
from megallama.config.schema import ParallelConfig, RunConfig, Schedule
from megallama.data.loader import MicroBatch
from megallama.errors import UserError
from megallama.layout.schedules import Action, Kind, action_lists, stage_ranks
from megallama.layout.topology import Topology
from megallama.model.llama import TensorParallelContext
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import build_mesh
from megallama.parallel.spawn import run_ranks
from megallama.plan.time.simulation import Span, bubble, draw, makespan, relative_seconds, simulate
from megallama.train.pipeline import Pipeline, Stage

UNIT = 0.6
"""Seconds of one part of the work of all stages of a rank: so long that what Python and gloo add is small beside it."""

ROUNDS = 3
"""At most: whatever else the machine does only adds waiting."""

SCHEDULES: list[Schedule] = ["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"]


def seconds(parallel: ParallelConfig, unit: float = UNIT) -> dict[tuple[Kind, int], float]:
    """The same work on each rank, whatever the number of its stages. Stage 0 leaves its backward to the weights."""
    count = len(stage_ranks(parallel))
    part = unit * parallel.pipeline / count
    found: dict[tuple[Kind, int], float] = {}
    for stage in range(count):
        parts: dict[Kind, float] = {"F": 1, "B": 2, "I": 1 if stage else 0, "W": 1 if stage else 2}
        found |= {(kind, stage): part * times for kind, times in parts.items()}
    return found


def simulated(schedule: Schedule, pp: int, micro_batches: int) -> list[list[Span]]:
    parallel = ParallelConfig(pipeline=pp, schedule=schedule)
    return simulate(action_lists(parallel, micro_batches), seconds(parallel))


@pytest.mark.parametrize(("pp", "micro_batches"), [(2, 4), (4, 8), (4, 16), (8, 32)])
def test_bubbles_are_those_of_the_literature(pp: int, micro_batches: int) -> None:
    """(p - 1) / (m + p - 1) for 1F1B, its warm-up halved by two chunks, and by a V the fill of half a forward."""
    m, p = micro_batches, pp
    assert bubble(simulated("1f1b", p, m)) == pytest.approx((p - 1) / (m + p - 1))
    assert bubble(simulated("interleaved1f1b", p, m)) == pytest.approx((p - 1) / (2 * m + p - 1))
    fill = (p - 1) / 2
    assert bubble(simulated("zbvzerobubble", p, m)) == pytest.approx(fill / (3 * m + fill), rel=0.35)


def test_the_drawing_of_two_micro_batches() -> None:
    spans = simulate(action_lists(ParallelConfig(pipeline=2), 2), {("F", 0): 1, ("F", 1): 1, ("B", 0): 2, ("B", 1): 2})
    assert makespan(spans) == 9
    assert draw(spans, 9) == "  0 01..aa.bb\n  1 .0aa1bb.."


def test_a_drawing_that_is_longer_than_its_width_goes_on_below() -> None:
    spans = simulate(action_lists(ParallelConfig(pipeline=2), 2), {("F", 0): 1, ("F", 1): 1, ("B", 0): 2, ("B", 1): 2})
    assert draw(spans, 5) == "  0 01..a\n  1 .0aa1\n\n  0 a.bb\n  1 bb.."


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("config", "overrides"),
    [
        ("7b", ["train.global_batch_size=128"]),
        ("7b", ["train.global_batch_size=512"]),
        ("8b", ["train.global_batch_size=64", "parallel.pipeline=2"]),
    ],
)
def test_every_action_that_takes_time_is_drawn_and_no_other(
    schedule: Schedule, config: str, overrides: list[str]
) -> None:
    run = load_config(f"configs/{config}.yaml", [*overrides, f"parallel.schedule={schedule}"])
    micro_batches = run.train.global_batch_size // (run.train.micro_batch_size * 2)
    spans = simulate(action_lists(run.parallel, micro_batches), relative_seconds(run))
    for width in (60, 94, 1000):
        blocks = [block.splitlines() for block in draw(spans, width).split("\n\n")]
        for rank, row in enumerate(spans):
            line = "".join(block[rank][4:] for block in blocks).replace(".", "")
            done = "".join(letter(span.action) for span in row if span.end > span.start)
            assert [mark for mark, _ in groupby(line)] == [mark for mark, _ in groupby(done)]
            each = zip(groupby(line), groupby(done), strict=True)
            assert all(len(list(columns)) >= len(list(actions)) for (_, columns), (_, actions) in each)


def letter(action: Action) -> str:
    """As the legend says."""
    letters = {"F": "0123456789", "B": "abcdefghij", "I": "abcdefghij", "W": "w" * 10}
    return letters[action.kind][action.micro_batch % 10]


@pytest.mark.parametrize(("recompute", "whole", "split"), [("none", 3, 3), ("selective", 3, 3), ("full", 4, 5)])
def test_full_recomputation_runs_a_layer_again_in_each_part_of_its_backward(
    recompute: str, whole: float, split: float
) -> None:
    config = load_config("configs/7b.yaml", ["parallel.schedule=zbvzerobubble", f"train.recompute={recompute}"])
    took, layers = relative_seconds(config), 4
    assert took["F", 1] + took["B", 1] == whole * layers
    assert took["F", 1] + took["I", 1] + took["W", 1] == split * layers
    assert took["F", 0] + took["I", 0] + took["W", 0] == took["F", 0] + took["B", 0] == whole * layers
    assert took["F", 7] + took["I", 7] + took["W", 7] == pytest.approx(split * layers + 3 * 0.6219, abs=1e-4)


class Busy(torch.autograd.Function):
    """Passes x on; takes `forward` seconds there and `backward` seconds back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return grads[0], None, None


class SleepingStage(nn.Module):
    """A stage whose forward, input gradient and weight gradient take their times."""

    def __init__(self, index: int, count: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))
        self.first, self.last, self.part = index == 0, index == count - 1, 0.0

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.first:
            x = torch.zeros(*x.t().shape, 8, requires_grad=True)
        weight = Busy.apply(self.weight, 0.0, self.part)  # type: ignore[no-untyped-call]
        x = Busy.apply(x, self.part, self.part) + weight  # type: ignore[no-untyped-call]
        return x.square().sum() if self.last else x


class SleepingChunks(nn.Module):
    """In the place of `ModelStages`."""

    def __init__(self, config: RunConfig, rank: int) -> None:
        super().__init__()
        self.tp_context = TensorParallelContext()
        self.ranks = ranks = stage_ranks(config.parallel)
        self.indices = [stage for stage, holder in enumerate(ranks) if holder == rank]
        self.part = UNIT * config.parallel.pipeline / len(ranks)
        self.models = nn.ModuleList(SleepingStage(index, len(ranks)) for index in self.indices)

    def begin_to_sleep(self) -> None:
        """From here on stages take their times."""
        for stage in self.models:
            stage.part = self.part


Done = list[tuple[Action, float]]
"""What a rank computed, in its order, and the seconds that each took: a sleep ends when the system lets it."""


Step = tuple[float, Done]
"""Seconds of a step on one rank, and what it computed."""


def run_step(launch: Launch, config: RunConfig, micro_batches: int) -> Step:
    """A step, after one that sets up and does not sleep."""
    done: Done = []
    record(done)
    mesh = build_mesh(Topology(pp=config.parallel.pipeline), launch, torch.device("cpu"))
    chunks: Any = SleepingChunks(config, mesh.pp.rank)
    pipeline = Pipeline(chunks, config, mesh, lambda _: None)
    tokens = torch.zeros(1, config.data.sequence_length, dtype=torch.int64)
    batches = [MicroBatch(tokens, tokens)] * micro_batches
    pipeline.forward_backward(batches, torch.ones(()))
    chunks.begin_to_sleep()
    torch.distributed.barrier()
    done.clear()
    began = time.perf_counter()
    pipeline.forward_backward(batches, torch.ones(()))
    torch.distributed.barrier()
    return time.perf_counter() - began, done


def record(done: Done) -> None:
    """Note every computation of this rank's stages."""

    def timed(name: str, kind: Callable[[dict[str, Any]], Kind]) -> None:
        original = getattr(Stage, name)

        def compute(self: Stage, micro_batch: int, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = original(self, micro_batch, *args, **kwargs)
            done.append((Action(kind(kwargs), self.stage_index, micro_batch), time.perf_counter() - began))
            return result

        setattr(Stage, name, compute)

    timed("forward_one_chunk", lambda _: "F")
    timed("backward_one_chunk", lambda kwargs: "B" if kwargs.get("full_backward", True) else "I")
    timed("backward_weight_one_chunk", lambda _: "W")


@pytest.mark.benchmarks
@pytest.mark.timeout(900)
def test_stages_of_known_times_wait_as_long_as_simulated_and_run_in_its_order() -> None:
    pp, micro_batches = 4, 8
    taken: dict[Schedule, float] = {}
    for schedule in SCHEDULES:
        overrides = [f"parallel.pipeline={pp}", f"parallel.schedule={schedule}", "model.hidden_size=8"]
        config = load_config("configs/debug.yaml", [*overrides, "data.sequence_length=4", "train.micro_batch_size=1"])
        lists = action_lists(config.parallel, micro_batches)
        for _ in range(ROUNDS):
            every, found = zip(*run_ranks(run_step, pp, config, micro_batches), strict=True)
            taken[schedule] = max(every)
            assert [[action for action, _ in done] for done in found] == lists, schedule
            took = medians([entry for done in found for entry in done])
            spans = simulate(lists, took)
            waiting = 1 - sum(span.end - span.start for rank in spans for span in rank) / (taken[schedule] * pp)
            print(f"{schedule}: waiting {waiting:.1%}, simulated {bubble(spans):.1%}")
            simulated_waiting = pytest.approx(bubble(spans), rel=0.1, abs=0.02)
            if waiting == simulated_waiting:
                break
        # Time that a stage loses in itself would else be on both sides of what follows.
        known = {key: value for key, value in seconds(config.parallel).items() if key in took}
        assert took == pytest.approx(known, rel=0.1, abs=UNIT / 100), schedule
        assert taken[schedule] == pytest.approx(makespan(spans), rel=0.1), schedule
        assert waiting == simulated_waiting, schedule
    assert taken["1f1b"] > taken["interleaved1f1b"] > max(taken["dualpipev"], taken["zbvzerobubble"])


def medians(done: Done) -> dict[tuple[Kind, int], float]:
    """Seconds by kind and stage. One action that the system held up does not count as all of its kind."""
    each: dict[tuple[Kind, int], list[float]] = {}
    for action, taken in done:
        each.setdefault((action.kind, action.stage), []).append(taken)
    return {key: median(values) for key, values in each.items()}


def test_plan_draws_the_timeline() -> None:
    result = CliRunner().invoke(app, ["plan", "configs/7b.yaml", "--timeline", "--gpus", "128"])
    assert result.exit_code == 0
    assert "1f1b, 16 micro-batches, 4 pipeline ranks, layers per stage 8 8 8 8" in result.stdout
    assert "waiting: 19.4% of all ranks' time" in result.stdout


@pytest.mark.parametrize("other", [["--json"], ["--flops=1e21"], ["--params=7B"], ["--tokens=2T"]])
def test_plan_refuses_a_timeline_beside_anything_else(other: list[str]) -> None:
    result = CliRunner().invoke(app, ["plan", "configs/7b.yaml", "--timeline", *other])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == f"--timeline does not go with {other[0]}; leave one of them out"
    assert result.stdout == ""


def test_plan_refuses_a_timeline_of_nothing() -> None:
    result = CliRunner().invoke(app, ["plan", "configs/debug.yaml", "--timeline"])
    assert isinstance(result.exception, UserError)
    assert "parallel.pipeline=1 has no timeline" in str(result.exception)
