"""The terms of a step: each from its own figures, and together what a pipeline of unequal stages takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.config.schema import Schedule
from megallama.errors import UserError
from megallama.plan.hardware import built_in_hardware
from megallama.plan.orders import action_lists
from megallama.plan.simulation import makespan, relative_seconds, simulate
from megallama.plan.step_time import StepTime, step_time, step_time_at
from megallama.plan.workload import DataScheme, Shape, Workload, workload

CONFIGS = Path(__file__).parents[2] / "configs"
LLAMA_8B = Shape(32, 4096, 14336, 4096, 1024, 128256)
ONE = Workload(LLAMA_8B, sequence_length=8192, micro_batch_size=1, micro_batches=4, fused=True)
H100 = built_in_hardware()["h100-80g"]
ADAM = 28 * (8_030_261_248 - 65 * 4096) / 3.35e12


def stepped(**changes: object) -> StepTime:
    return step_time_at(replace(ONE, **changes), H100, 0.5)  # type: ignore[arg-type]


def test_one_gpu_computes_and_steps_its_optimizer() -> None:
    found = stepped()
    assert found.matmul == pytest.approx(4 * 8192 * 6 * 7_504_658_432 / (0.5 * 989.4e12))
    assert found.optimizer == pytest.approx(ADAM)
    assert found.tensor == found.pipeline == found.bubble == found.data == 0
    assert found.total == pytest.approx(found.matmul + found.attention + found.memory + found.optimizer)


def test_only_matmuls_and_attention_depend_on_the_efficiency() -> None:
    slow, fast = (step_time_at(ONE, H100, share) for share in (0.25, 0.5))
    assert slow.matmul == pytest.approx(2 * fast.matmul)
    assert slow.attention == pytest.approx(2 * fast.attention)
    assert (slow.memory, slow.optimizer) == (fast.memory, fast.optimizer)


def test_tensor_parallelism_sends_what_its_paper_says() -> None:
    """16 s b h (tp - 1) / tp bytes per layer; a scatter and a gather more with sequence parallelism."""
    layer = 16 * 8192 * 4096 * 7 / 8
    whole = 33 * 4 * 40e-6 + 33 * layer / (0.8 * 450e9)
    # 32 layers of four all-reduces, and two for embedding and head: a half of a layer's.
    half = 0.5 * (4 * 40e-6 + layer / (0.8 * 450e9))
    assert stepped(tp=8).tensor == pytest.approx(4 * (whole - half))
    gathered = 4 * 32 * (40e-6 + layer / 4 / (0.8 * 450e9))
    assert stepped(tp=8, sequence_parallel=True).tensor == pytest.approx(stepped(tp=8).tensor + gathered)
    assert stepped(tp=8, overlapped=frozenset(["tensor"])).tensor == pytest.approx(stepped(tp=8).tensor / 2)


def test_a_pipeline_of_unequal_stages_takes_their_sum_and_the_slowest_again() -> None:
    """sum(t) + (m - 1) * max(t), exact where the last is the slowest (arXiv 2104.04473), with messages free."""
    free = H100.model_copy(update={"node_link_gb_s": 1e9, "nic_gb_s": 1e9})
    work = replace(ONE, layers_by_rank=(8, 8, 8, 8), micro_batches=16, overlapped=frozenset(["pipeline"]))
    found = step_time_at(work, free, 0.5)
    alone = [
        step_time_at(replace(work, shape=replace(LLAMA_8B, vocab_size=vocabulary), layers_by_rank=(8,)), free, 0.5)
        for vocabulary in (0, 0, 0, 128256)
    ]
    each = [rank.compute / 16 for rank in alone]
    # A stage without the head still has the traffic of its empty matmul.
    assert found.compute + found.bubble == pytest.approx(sum(each) + 15 * max(each), rel=2e-3)


@pytest.mark.parametrize(
    ("schedule", "chunks", "share"),
    [("1f1b", 1, 3 / 8), ("interleaved1f1b", 2, 3 / 16), ("dualpipev", 2, 3 / 24), ("zbvzerobubble", 2, 3 / 48)],
)
def test_schedules_differ_by_their_bubble(schedule: Schedule, chunks: int, share: float) -> None:
    work = replace(
        ONE,
        shape=replace(LLAMA_8B, vocab_size=0),
        layers_by_rank=(8, 8, 8, 8),
        micro_batches=8,
        schedule=schedule,
        chunks=chunks,
        overlapped=frozenset(["pipeline"]),
    )
    found = step_time_at(work, H100, 0.5)
    assert found.bubble == pytest.approx(share * found.compute, rel=2e-3)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"])
@pytest.mark.parametrize("name", ["7b", "8b", "70b"])
def test_stages_of_real_models_wait_as_in_the_simulation(name: str, schedule: Schedule) -> None:
    """Their layers do not divide evenly and one has the head: what the closed forms leave out is a few per cent."""
    overrides = [
        "parallel.pipeline=4",
        "parallel.tensor=1",
        f"parallel.schedule={schedule}",
        "train.micro_batch_size=1",
    ]
    config = load_config(CONFIGS / f"{name}.yaml", [*overrides, "train.global_batch_size=16"])
    times = relative_seconds(config)
    spans = simulate(action_lists(config.parallel, 16), times)
    busiest = max(sum(span.end - span.start for span in rank) for rank in spans)
    free = H100.model_copy(update={"memory_tb_s": 1e6, "node_link_gb_s": 1e9})
    found = step_time_at(workload(config, 4), free, 0.5)
    assert (found.compute + found.bubble) / found.compute == pytest.approx(makespan(spans) / busiest, rel=0.04)


@pytest.mark.parametrize(
    ("data", "per_parameter", "rounds"),
    [("zero1", 10, 2), ("all-reduce", 8, 2), ("sharded optimizer", 6, 2), ("zero2", 34, 5), ("zero3", 32, 12)],
)
def test_data_parallelism_moves_the_bytes_of_its_scheme(data: DataScheme, per_parameter: int, rounds: int) -> None:
    """For four micro-batches, fp32 gradients and bf16 weights, over all of a node: 7 / 8 of each parameter's bytes."""
    parameters, tables = 8_030_261_248 - 65 * 4096, 2 * 128_256 * 4096
    found = stepped(dp=8, data=data, bucket_elements=10**12)
    again = 4 * 2 * tables if data == "zero3" else 0  # what backward does not gather
    sent = (per_parameter * parameters - again) * 7 / 8
    assert found.data == pytest.approx(rounds * 40e-6 + sent / (0.8 * 450e9))
    assert found.optimizer == pytest.approx(ADAM if data == "all-reduce" else ADAM / 8)


def test_overlap_hides_behind_the_last_micro_batch_and_no_more() -> None:
    """ZeRO 3 communicates in all of them, and chunks are complete one after the other."""
    slow = H100.model_copy(update={"nic_gb_s": 1})
    work = replace(ONE, dp=64, tp=8)
    hidden = replace(work, overlapped=frozenset(["data"]))
    for data, micro_batches in (("zero1", 1), ("zero3", 4)):
        plain, found = (step_time_at(replace(w, data=data), slow, 0.5) for w in (work, hidden))  # type: ignore[arg-type]
        assert plain.data - found.data == pytest.approx(micro_batches / 4 * plain.compute)
    assert stepped(dp=8, overlapped=frozenset(["data"])).data == 0


def test_chunks_that_are_complete_send_while_the_pipeline_drains() -> None:
    slow = H100.model_copy(update={"nic_gb_s": 1})
    work = replace(ONE, dp=64, tp=8, layers_by_rank=(16, 16), schedule="interleaved1f1b", chunks=2)
    plain, found = (
        step_time_at(replace(work, overlapped=frozenset(overlap)), slow, 0.5)  # type: ignore[arg-type]
        for overlap in ([], ["data"])
    )
    assert plain.data - found.data == pytest.approx(2 / 4 * plain.compute + plain.bubble)


def test_a_tied_matrix_on_one_rank_is_stepped_once() -> None:
    tied = stepped(shape=replace(LLAMA_8B, tied=True))
    assert stepped().optimizer - tied.optimizer == pytest.approx(28 * 128256 * 4096 / 3.35e12)


def test_figures_that_are_not_known_are_asked_for() -> None:
    known = built_in_hardware()
    with pytest.raises(UserError, match=r"^b200\.efficiency is not known"):
        step_time(ONE, known["b200"])
    with pytest.raises(UserError, match=r"^cpu\.peak_tflops is not known"):
        step_time_at(ONE, known["cpu"], 0.5)
    with pytest.raises(UserError, match=r"^gh200-96g\.gpus_per_node is not known"):
        step_time_at(replace(ONE, dp=8), known["gh200-96g"], 0.5)
    assert step_time_at(ONE, known["gh200-96g"], 0.5).total > 0
