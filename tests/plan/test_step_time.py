"""The terms of a step: each from its own figures, and together what a pipeline of unequal stages takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.config.schema import Schedule
from megallama.errors import UserError
from megallama.layout.schedules import action_lists
from megallama.layout.stages import stages
from megallama.plan.hardware import built_in_hardware
from megallama.plan.memory.traffic import stage_traffic
from megallama.plan.time.simulation import makespan, relative_seconds, simulate
from megallama.plan.time.step_time import StepTime, step_time, step_time_at
from megallama.plan.time.workload import DataScheme, Shape, Workload, workload

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
    """16 s b h (tp - 1) / tp bytes per layer; two gathers more with sequence parallelism."""
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


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"])
@pytest.mark.parametrize(("name", "pp"), [("1b", 8), ("7b", 4), ("8b", 4), ("70b", 8)])
def test_stages_of_real_models_wait_as_in_the_simulation(
    name: str, pp: int, schedule: Schedule, recompute: str
) -> None:
    """Their layers do not divide evenly and one has the head."""
    layout = [f"parallel.pipeline={pp}", "parallel.tensor=1", f"parallel.schedule={schedule}"]
    layout += ["train.micro_batch_size=1", f"train.recompute={recompute}"]
    for micro_batches, error in ((2 * pp, 1e-9), (24 * pp, 0.02)):
        config = load_config(CONFIGS / f"{name}.yaml", [*layout, f"train.global_batch_size={micro_batches}"])
        spans = simulate(action_lists(config.parallel, micro_batches), relative_seconds(config))
        busiest = max(sum(span.end - span.start for span in rank) for rank in spans)
        work = replace(workload(config, pp), overlapped=frozenset(["pipeline"]))
        found = step_time_at(work, H100, 0.5)
        assert 1 + found.bubble / found.compute == pytest.approx(makespan(spans) / busiest, rel=error)


@pytest.mark.parametrize("schedule", ["1f1b", "zbvzerobubble", "dualpipev"])
def test_what_is_computed_again_takes_as_long_as_in_the_simulation(schedule: Schedule) -> None:
    """A layer's down projection apart, which is not: with it a forward would take a third of forward and backward."""
    layout = ["parallel.pipeline=8", "parallel.tensor=1", f"parallel.schedule={schedule}", "train.micro_batch_size=1"]
    found, expected = [], []
    for recompute in ("none", "full"):
        more = [f"train.recompute={recompute}", "train.global_batch_size=64"]
        config = load_config(CONFIGS / "70b.yaml", [*layout, *more])
        work = workload(config, 8)
        whole = replace(work, matmul_recompute_fraction=work.attention_recompute_fraction)
        free = H100.model_copy(update={"memory_tb_s": 1e6})
        found.append(step_time_at(whole, free, 0.5).matmul)
        spans = simulate(action_lists(config.parallel, 64), relative_seconds(config))
        expected.append(max(sum(span.end - span.start for span in rank) for rank in spans))
    assert found[1] / found[0] == pytest.approx(expected[1] / expected[0], rel=0.04)


@pytest.mark.parametrize(
    ("data", "per_parameter", "rounds"),
    [("zero1", 10, 2), ("all-reduce", 8, 2), ("sharded optimizer", 6, 2), ("zero2", 34, 5), ("zero3", 32, 12)],
)
def test_data_parallelism_moves_the_bytes_of_its_scheme(data: DataScheme, per_parameter: int, rounds: int) -> None:
    """For four micro-batches, fp32 gradients and bf16 weights, over all of a node: 7 / 8 of each parameter's bytes."""
    parameters = 8_030_261_248 - 65 * 4096
    found = stepped(dp=8, data=data, bucket_elements=10**9)
    kept = 4 * 2 * 2 * 10**9 if data == "zero3" else 0  # what backward need not gather
    sent = (per_parameter * parameters - kept) * 7 / 8
    assert found.data == pytest.approx(9 * rounds * 40e-6 + sent / (0.8 * 450e9))
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


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("cut", ["true", "false"])
@pytest.mark.parametrize("heads", [8, 2])
def test_tensor_parallel_time_is_that_of_the_collectives_that_a_check_counts(
    recompute: str, cut: str, heads: int
) -> None:
    """A gather or a scatter takes half of an all-reduce; sums of norms and of the loss are left out."""
    layout = ["parallel.tensor=4", "parallel.pipeline=1", f"parallel.sequence={cut}", f"train.recompute={recompute}"]
    batch = ["train.micro_batch_size=1", "train.global_batch_size=1", f"model.num_key_value_heads={heads}"]
    config = load_config(CONFIGS / "8b.yaml", [*layout, *batch])
    (stage,) = stages(config)
    counted = stage_traffic(config, stage, 1).size
    sent = 2 * counted["all_reduce"] + counted["all_gather"] + counted["reduce_scatter"]
    quick = H100.model_copy(update={"gpus_per_node": 8})
    found = step_time_at(workload(config, 4), quick, 0.5).tensor
    reductions = 32 * ((5 if cut == "true" else 4) + (recompute == "full") * (1.5 if cut == "true" else 1)) + 2
    gathered = 32 * (2 + (recompute == "full")) if heads == 2 else 0
    latencies = 40e-6 * (reductions + gathered)
    assert found - latencies == pytest.approx(sent * 3 / 4 / (0.8 * 450e9), rel=2e-3)
