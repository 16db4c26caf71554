"""The terms of a step: each from its own figures, and together what a pipeline of unequal stages takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.config.schema import RunConfig, Schedule
from megallama.errors import UserError
from megallama.hardware.gpus import Gpu, built_in_hardware
from megallama.layout.schedules import action_lists
from megallama.layout.stages import stages
from megallama.plan.memory.state import rank_parameters
from megallama.plan.memory.traffic import stage_traffic
from megallama.plan.time.simulation import makespan, relative_seconds, simulate
from megallama.plan.time.software import Machine, find_software, known_software, machine
from megallama.plan.time.step_time import PAGEABLE_GB_S, StepTime, rank_works, step_time, sum_bytes

CONFIGS = Path(__file__).parents[2] / "configs"
KNOWN = built_in_hardware()
H100 = KNOWN["h100-80g"]
ON = Machine(H100, known_software()["megallama"], 0.5)
FREE = H100.model_copy(update={"node_link_gb_s": 1e9, "nic_gb_s": 1e9})
PARAMETERS = 8_030_261_248
ADAM = PARAMETERS / 3.35e12
"""For each byte that an update moves."""
AVERAGES = ("none", "exponential", "latest")
PLAIN = ["parallel.tensor=1", "parallel.pipeline=1", "train.micro_batch_size=1", "train.recompute=none"]


def run(*words: str, name: str = "8b", micro_batches: int = 4, dp: int = 1) -> RunConfig:
    batch = f"train.global_batch_size={micro_batches * dp}"
    return load_config(CONFIGS / f"{name}.yaml", [*PLAIN, "data.sequence_length=8192", batch, *words])


def overlapping(*what: str, gpu: Gpu = H100) -> Machine:
    """Megallama, were it to hide these."""
    software = ON.software.model_copy(update={"overlap": frozenset(what)})
    return replace(ON, software=software, gpu=gpu)


def test_one_gpu_computes_and_steps_its_optimizer() -> None:
    found = step_time(run(), 1, ON)
    assert found.matmul == pytest.approx(4 * 8192 * 6 * 7_504_658_432 / (0.5 * 989.4e12))
    assert found.optimizer == pytest.approx(42 * ADAM)
    assert found.tensor == found.pipeline == found.bubble == found.data == 0
    assert found.total == pytest.approx(found.matmul + found.attention + found.memory + found.optimizer)


def test_ranks_of_a_node_share_the_memory_of_its_host() -> None:
    """Each of 8 ranks has an eighth of the state and its own way there, and all of them one memory."""
    alone, node = (step_time(run("zero.offload_optimizer=cpu", dp=dp), dp, ON).optimizer for dp in (1, 8))
    crossing = 6 * PARAMETERS / (PAGEABLE_GB_S * 1e9)
    assert alone - crossing == pytest.approx(node - crossing / 8)


def test_an_average_of_every_update_is_a_pass_of_12_bytes() -> None:
    by_kind = {kind: step_time(run(f"train.average.kind={kind}", "checkpoint.keep=5"), 1, ON) for kind in AVERAGES}
    assert by_kind["exponential"].optimizer == pytest.approx(54 * ADAM)
    assert by_kind["latest"] == by_kind["none"]


def test_only_matmuls_and_attention_depend_on_the_efficiency() -> None:
    slow, fast = (step_time(run(), 1, replace(ON, efficiency=share)) for share in (0.25, 0.5))
    assert (slow.matmul, slow.attention) == (pytest.approx(2 * fast.matmul), pytest.approx(2 * fast.attention))
    assert (slow.memory, slow.optimizer) == (fast.memory, fast.optimizer)


def test_sums_of_bf16_gradients_are_a_pass_of_their_own_of_megallama() -> None:
    """A copy of the first of four, and a sum of each other: 6 and 10 bytes a parameter."""
    other = Machine(H100, known_software()["megallama"].model_copy(update={"sums": 0.0}), 0.5)
    found = step_time(run(), 1, ON).memory - step_time(run(), 1, other).memory
    assert found == pytest.approx((6 + 3 * 10) * PARAMETERS / 3.35e12)


def test_an_assumed_mfu_takes_the_place_of_everything() -> None:
    found = step_time(run(), 1, machine(KNOWN["b200"], mfu=0.4))
    flops = 4 * 8192 * (6 * 7_504_658_432 + 12 * 32 * 4096 * 8192)
    assert found == StepTime(pytest.approx(flops / (0.4 * 2250e12)), assumed=True)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("cut", ["true", "false"])
@pytest.mark.parametrize("heads", [8, 2])
def test_tensor_parallel_time_is_that_of_the_collectives_that_a_check_counts(
    recompute: str, cut: str, heads: int
) -> None:
    layout = ["parallel.tensor=4", f"parallel.sequence={cut}", f"train.recompute={recompute}"]
    config = run(*layout, f"model.num_key_value_heads={heads}", micro_batches=1)
    (stage,) = stages(config)
    counted = stage_traffic(config, stage, 1)
    halves = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}
    sent, waits = (sum(halves[kind] * each[kind] for kind in halves) for each in (counted.size, counted.number))
    found, norms = step_time(config, 4, overlapping()).tensor, 0.0
    if cut == "true":  # the sum of norms' gradients, once: two of each layer and the last
        norms = 40e-6 + 2 * 4 * (2 * 32 + 1) * 4096 * 3 / 4 / (0.8 * 450e9)
    assert found == pytest.approx(waits * 20e-6 + sent * 3 / 4 / (0.8 * 450e9) + norms)
    assert step_time(config, 4, overlapping("tensor")).tensor == pytest.approx((found - norms) / 2 + norms)


@pytest.mark.parametrize("cut", ["true", "false"])
def test_what_columns_send_in_backward_hides_behind_their_matmuls(cut: str) -> None:
    """As much as two of four all-reduces of a layer, however long it takes up to these matmuls."""
    config = run("parallel.tensor=4", f"parallel.sequence={cut}", micro_batches=1)
    hidden = step_time(config, 4, overlapping()).tensor - step_time(config, 4, overlapping("columns")).tensor
    assert hidden == pytest.approx(32 * 2 * (40e-6 + 2 * 2 * 8192 * 4096 * 3 / 4 / (0.8 * 450e9)))
    slow = overlapping("columns", gpu=H100.model_copy(update={"node_link_gb_s": 1.0}))
    hidden = (
        step_time(config, 4, replace(slow, software=overlapping().software)).tensor - step_time(config, 4, slow).tensor
    )
    matmuls = 32 * 4 * 8192 * 4096 * (6144 + 2 * 14336) / 4
    assert hidden == pytest.approx(matmuls / slow.matmul_flops)


def test_a_backward_in_two_parts_repeats_the_collectives_of_what_it_computes_again() -> None:
    layout = ["parallel.tensor=8", "parallel.pipeline=2", "parallel.schedule=zbvzerobubble", "train.recompute=full"]
    config = run(*layout, micro_batches=8)
    works, layers = rank_works(config, ON, 8), [rank.layers for rank in rank_parameters(config)]
    for rank, work in enumerate(works):
        once = sum(stage_traffic(config, each, 4).number["all_gather"] for each in stages(config) if each.rank == rank)
        assert work.traffic.number["all_gather"] == once + 2 * layers[rank]


def test_tensor_parallelism_sends_what_its_paper_says() -> None:
    """16 s b h (tp - 1) / tp bytes per layer, and as much as half a layer for embedding and head."""
    config = run("parallel.tensor=8", "parallel.sequence=false")
    whole = 32.5 * (4 * 40e-6 + 16 * 8192 * 4096 * 7 / 8 / (0.8 * 450e9))
    # The loss's sums are two and a maximum for each chunk of logits, of 4 bytes a position.
    assert step_time(config, 8, overlapping()).tensor == pytest.approx(4 * whole, rel=2e-3)


def test_a_pipeline_of_unequal_stages_takes_their_sum_and_the_slowest_again() -> None:
    """sum(t) + (m - 1) * max(t), exact where the last is the slowest (arXiv 2104.04473), with messages free."""
    config = run("parallel.pipeline=4", "parallel.layers_per_stage=even", micro_batches=16)
    on = Machine(FREE.model_copy(update={"memory_tb_s": 1e9}), ON.software, 0.5)
    found, seconds = step_time(config, 4, on), [work.seconds(on, config).total for work in rank_works(config, on, 16)]
    assert found.compute + found.bubble == pytest.approx(sum(seconds) + 15 * max(seconds), rel=1e-2)


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("schedule", ["1f1b", "interleaved1f1b", "dualpipev", "zbvzerobubble"])
@pytest.mark.parametrize(("name", "pp"), [("1b", 8), ("7b", 4), ("70b", 8)])
def test_stages_of_real_models_wait_as_in_the_simulation(
    name: str, pp: int, schedule: Schedule, recompute: str
) -> None:
    """Their layers do not divide evenly and one has the head."""
    layout = [f"parallel.pipeline={pp}", f"parallel.schedule={schedule}", f"train.recompute={recompute}"]
    for micro_batches, error in ((2 * pp, 1e-9), (24 * pp, 0.02)):
        config = run(*layout, "data.sequence_length=2048", name=name, micro_batches=micro_batches)
        spans = simulate(action_lists(config.parallel, micro_batches), relative_seconds(config))
        busiest = max(sum(span.end - span.start for span in rank) for rank in spans)
        found = step_time(config, pp, overlapping("pipeline"))
        assert 1 + found.bubble / found.compute == pytest.approx(makespan(spans) / busiest, rel=error)


@pytest.mark.parametrize(
    ("schedule", "messages"), [("1f1b", 2), ("interleaved1f1b", 4), ("dualpipev", 4), ("zbvzerobubble", 4)]
)
def test_a_middle_rank_sends_each_of_its_stages_results_there_and_back(schedule: str, messages: int) -> None:
    config = run("parallel.pipeline=4", f"parallel.schedule={schedule}", micro_batches=16)
    works = rank_works(config, ON, 16)
    assert works[1].messages == messages
    assert sum(work.messages for work in works) == {"1f1b": 6, "interleaved1f1b": 14}.get(schedule, 12)
    one = 40e-6 + 2 * 8192 * 4096 / (0.8 * 450e9)
    found = step_time(config, 4, ON)
    assert found.pipeline == pytest.approx(16 * messages * one)


@pytest.mark.parametrize(
    ("software", "stage", "per_parameter", "waits", "updated"),
    [
        ("megallama", 1, 6, 1, 42 / 8),
        ("picotron", 1, 8, 1, 28),
        ("megatron-2024", 1, 6, 1, 28 / 8),
        ("megallama", 2, 34, 4.5, 42 / 8),
        ("megallama", 3, 32, 6, 50 / 8),
    ],
)
def test_data_parallelism_moves_the_bytes_of_its_scheme(
    software: str, stage: int, per_parameter: int, waits: float, updated: float
) -> None:
    """For four micro-batches, fp32 gradients and bf16 weights, over all of a node: 7 / 8 of each parameter's bytes."""
    plain = known_software()[software].model_copy(update={"overlap": frozenset()})
    # In one group the last gradient has nothing left to hide behind.
    config = run(f"zero.stage={stage}", f"zero.bucket_elements={10**9 if stage > 1 else 10**10}", dp=8)
    found = step_time(config, 8, Machine(H100, plain, 0.5))
    kept = 4 * 2 * 2 * 10**9 if stage == 3 else 0  # what backward need not gather
    sent = (per_parameter * PARAMETERS - kept) * 7 / 8
    assert found.data == pytest.approx((9 if stage > 1 else 1) * waits * 40e-6 + sent / (0.8 * 450e9))
    assert found.optimizer == pytest.approx(updated * ADAM)


@pytest.mark.parametrize(("stage", "trained", "frozen", "updated"), [(1, 6, 0, 42), (2, 34, 0, 42), (3, 32, 16, 50)])
def test_frozen_weights_are_not_reduced_and_not_stepped(stage: int, trained: int, frozen: int, updated: int) -> None:
    """ZeRO 3 gathers them as the others, twice in each of four micro-batches."""
    bucket = f"zero.bucket_elements={10**9 if stage > 1 else 10**10}"
    config = run(f"zero.stage={stage}", bucket, "train.freeze=['*.mlp.*']", dp=8)
    mlp = 32 * 3 * 4096 * 14336
    hardly_waiting = H100.model_copy(update={"node_link_gb_s": 1e-3})
    found = step_time(config, 8, Machine(hardly_waiting, known_software()["megallama"], 0.5))
    kept = 4 * 2 * 2 * 10**9 if stage == 3 else 0  # what backward need not gather
    sent = (trained * (PARAMETERS - mlp) + frozen * mlp - kept) * 7 / 8
    assert found.data == pytest.approx(sent / (0.8 * 1e6), rel=1e-6)
    assert found.optimizer == pytest.approx(updated * (PARAMETERS - mlp) / 8 / 3.35e12)


SLOW = H100.model_copy(update={"nic_gb_s": 1})


SHARDED = known_software()["megatron-2024"]


def sharded(*what: str, gpu: Gpu = H100) -> Machine:
    """A sharded optimizer, were it to hide these."""
    return Machine(gpu, SHARDED.model_copy(update={"overlap": frozenset(what)}), 0.5)


def test_overlap_hides_behind_the_last_micro_batch_and_with_zero_3_behind_all() -> None:
    for stage, behind, on in ((1, 1 / 4, sharded), (3, 1, overlapping)):
        config = run("parallel.tensor=8", f"zero.stage={stage}", dp=64)
        plain, found = (step_time(config, 512, on(*what, gpu=SLOW)) for what in ([], ["data"]))
        assert plain.data - found.data == pytest.approx(behind * plain.compute)


def test_what_is_hidden_leaves_a_layers_part_of_zero_3_and_nothing_of_zero_1() -> None:
    for stage, left, on in ((1, 0, sharded), (3, 1 / 32, overlapping)):
        config = run(f"zero.stage={stage}", dp=8)
        plain, found = (step_time(config, 8, on(*what)) for what in ([], ["data"]))
        assert found.data == pytest.approx(left * plain.data)


def test_stages_that_are_complete_send_while_the_pipeline_drains() -> None:
    config = run("parallel.tensor=8", "parallel.pipeline=2", "parallel.schedule=interleaved1f1b", dp=64)
    plain, found = (step_time(config, 1024, sharded(*what, gpu=SLOW)) for what in ([], ["data"]))
    assert plain.data - found.data == pytest.approx(2 / 4 * plain.compute + plain.bubble)


@pytest.mark.parametrize("gpu", [H100, SLOW])
def test_gradient_sums_at_zero_1_hide_behind_the_last_backward_but_for_the_last_group(gpu: Gpu) -> None:
    """Of groups of 1e8 parameters; the weights are gathered in the open."""
    config = run("parallel.tensor=8", dp=64)
    found, moved = step_time(config, 512, Machine(gpu, ON.software, 0.5)), PARAMETERS / 8 * 63 / 64
    link, groups = min(0.8 * 450e9, gpu.known("nic_gb_s") * 1e9 * 0.95), 11
    sums, gather = (groups * 190e-6 + size * moved / link for size in (4, 2))
    hidden = min(sums - sums / groups, 2 / 3 * found.compute / 4)
    assert found.data == pytest.approx(gather + sums - hidden, rel=2e-3)


def test_gradients_are_copied_first_and_added_later() -> None:
    for dtype, first, later in (("bf16", 6, 10), ("fp32", 8, 12)):
        for micro_batches in (1, 4):
            moved = sum_bytes(run(f"train.dtype={dtype}"), ON.software, micro_batches)
            assert moved == (first + (micro_batches - 1) * later) / micro_batches
    assert sum_bytes(run("zero.stage=2"), ON.software, 4) == 18
    assert sum_bytes(run(), SHARDED, 4) == 0


def test_a_tied_matrix_on_one_rank_is_stepped_once() -> None:
    tied = step_time(run("model.tie_word_embeddings=true"), 1, ON)
    assert step_time(run(), 1, ON).optimizer - tied.optimizer == pytest.approx(42 * 128256 * 4096 / 3.35e12)


@pytest.mark.parametrize(
    ("gpu", "software", "sentence"),
    [
        ("b200", "megallama", r"^b200\.efficiency is not known; assume a speed by --mfu 0\.4, calibrate"),
        ("h100-80g", "llama-1", r"^--software=llama-1 has no constant on h100-80g; use megatron-2024, llama-3"),
    ],
)
def test_a_constant_that_is_not_known_is_asked_for(gpu: str, software: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        machine(KNOWN[gpu], known_software()[software])


def test_a_name_that_is_no_software_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"^--software=megatron is not known; did you mean megatron-2024\?"):
        find_software(H100, "megatron")
    own = H100.model_copy(update={"efficiency": {"mine": 0.7}})
    assert machine(own, find_software(own, "mine")).efficiency == machine(own).efficiency == 0.7


def test_figures_that_are_not_known_are_asked_for() -> None:
    with pytest.raises(UserError, match=r"^cpu\.peak_tflops is not known"):
        step_time(run(), 1, Machine(KNOWN["cpu"], ON.software, 0.5))
    alone = Machine(KNOWN["gh200-96g"], ON.software, 0.5)
    with pytest.raises(UserError, match=r"^gh200-96g\.gpus_per_node is not known"):
        step_time(run(dp=8), 8, alone)
    assert step_time(run(), 1, alone).total > 0
