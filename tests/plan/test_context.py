"""Context parallelism in a plan: what its ranks hold, send and compute, and where a search takes it."""

from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megallama.cli import app
from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.hardware.gpus import find_gpu
from megallama.layout.check import check_config
from megallama.layout.topology import AxisName, Topology, context_slices
from megallama.plan.memory.activations import tensors
from megallama.plan.memory.ledger import memory_rows, rank_bytes
from megallama.plan.search.changes import refuse_too_large, single_changes
from megallama.plan.search.search import search
from megallama.plan.search.space import LEAST_PART
from megallama.plan.time.kernels import layer_work
from megallama.plan.time.software import Machine, known_software, machine
from megallama.plan.time.step_time import step_time
from tests.plan.test_plan_command import CONFIGS, planned

H100 = find_gpu("h100-80g")
ON = Machine(H100, known_software()["megallama"], 0.5)
LENGTH = 131_072
LONG = [f"data.sequence_length={LENGTH}", f"model.max_position_embeddings={LENGTH}", "train.global_batch_size=32"]


def run(*words: str, name: str = "8b") -> RunConfig:
    return load_config(CONFIGS / f"{name}.yaml", [*LONG, "parallel.tensor=2", *words])


@pytest.mark.parametrize(("recompute", "passes"), [("none", 1), ("selective", 1), ("full", 2)])
@pytest.mark.parametrize(
    ("cp", "latency", "bandwidth"), [(4, 40e-6, 0.8 * 450e9), (8, 380e-6, 4 * 0.95 * 50e9), (16, 380e-6, 4 * 47.5e9)]
)
def test_keys_and_values_cross_once_and_their_gradients_once(
    recompute: str, passes: int, cp: int, latency: float, bandwidth: float
) -> None:
    """4 s b kv (cp - 1) / cp bytes each way per layer; of the ranks two apart four are on a node."""
    config = run(f"parallel.context={cp}", f"train.recompute={recompute}")
    one = 2 * 2 * LENGTH * 1024 / 2 * (cp - 1) / cp / bandwidth + latency / 2
    assert step_time(config, 2 * cp, ON).context == pytest.approx(32 * 32 * (passes + 1) * one)


@pytest.mark.parametrize(("recompute", "passes"), [("none", 1), ("full", 2)])
def test_ulysses_exchanges_queries_keys_values_and_outputs(recompute: str, passes: int) -> None:
    """(4 q + 4 kv) s b / cp * (cp - 1) / cp bytes per layer and pass, in three exchanges."""
    config = run("parallel.context=4", "parallel.context_mode=ulysses", f"train.recompute={recompute}")
    one = (4 * 4096 + 4 * 1024) / 2 * LENGTH / 4 * 3 / 4 / (0.8 * 450e9) + 3 * 20e-6
    assert step_time(config, 8, ON).context == pytest.approx(32 * 32 * (passes + 1) * one)


@pytest.mark.parametrize("cp", [2, 4, 16])
def test_every_rank_attends_to_as_much_as_the_plan_says(cp: int) -> None:
    """Counted in pairs of positions, which are half of the square."""
    length = 4096
    words = (f"parallel.context={cp}", f"data.sequence_length={length}", "train.micro_batch_size=1")
    work = layer_work(run(*words), tensors(run(*words)), known_software()["megallama"])
    pair = 14 * 4096 / 2  # FLOPs, forward and backward with the scores again, over the width of a rank's queries
    for rank in range(cp):
        pairs = sum(place + 1 for each in context_slices(length, rank, cp) for place in range(each.start, each.stop))
        assert work.attention_flops == pytest.approx(pair * pairs, rel=0.01)


def test_gradients_and_the_optimizer_are_cut_over_copies_and_parts_and_stages_stand_behind_both() -> None:
    cut = run("parallel.context=4", "parallel.pipeline=2")
    copies = cut.model_copy(update={"parallel": cut.parallel.model_copy(update={"context": 1})})
    (one, *_), (other, *_) = memory_rows(cut, 2), memory_rows(copies, 8)
    state = slice(0, 5)
    assert [row.size for row in one[state]] == [row.size for row in other[state]]
    found, same = step_time(cut, 32, ON), step_time(copies, 32, ON)
    assert (found.data, found.optimizer) == (same.data, same.optimizer) != (0, 0)
    messages = (same.pipeline / 2 - 2 * 40e-6) / 4  # micro-batches are four times as many, of a quarter each
    assert found.pipeline / 8 - 2 * 40e-6 == pytest.approx(messages)


@pytest.mark.parametrize("sizes", list(product((1, 2), repeat=4)), ids=str)
def test_communicators_are_the_groups_that_a_mesh_makes(sizes: tuple[int, ...]) -> None:
    topology = Topology(*sizes)
    axes: list[list[AxisName]] = [["tp"], ["pp"], ["cp"], ["dp", "cp"], ["pp", "tp"], ["pp", "dp", "cp", "tp"]]
    groups = {tuple(topology.peers(0, names)) for names in axes} - {(0,)}
    words = [f"parallel.pipeline={topology.pp}", f"parallel.context={topology.cp}", f"parallel.tensor={topology.tp}"]
    overhead = memory_rows(run(*words, "train.device=cuda"), topology.dp)[0][-1]
    assert f" {len(groups)} communicators," in overhead.how


def test_short_sequences_are_never_cut() -> None:
    config = load_config(CONFIGS / "8b.yaml", [f"data.sequence_length={LEAST_PART}"])
    assert {one.config.parallel.context for one in search(config, 16, machine(H100)).found} == {1}
    assert "parallel.context" not in {one.key for one in single_changes(config, 16, 8)}


def test_long_sequences_are_cut_where_a_batch_has_too_few_or_memory_does_not_fit() -> None:
    result = search(run(), 128, machine(H100))
    parallels = [one.config.parallel for one in result.found]
    assert parallels[0].context > 1 and {each.context for each in parallels} == {1, 2, 4, 8, 16}
    whole = min(one.seconds for one in result.found if one.config.parallel.context == 1)
    assert min(one.seconds for one in result.found) < 0.98 * whole
    for one in result.found[:50]:
        check_config(one.config, 128)
        assert one.size == max(rank_bytes(one.config, 128)) <= H100.usable_bytes
        assert f" cp{one.config.parallel.context} " in one.name or one.config.parallel.context == 1
    too_large = result.rejected["more than 77.6 GiB"]
    for tp, pp, cp in {(each.tensor, each.pipeline, each.context) for each in parallels if each.context > 1}:
        wider = f"tp {tp} pp {pp}" + (f" cp {cp // 2}" if cp > 2 else "")
        assert wider in too_large or 2 * 128 // (tp * pp * cp) > 32, (tp, pp, cp)


def test_a_run_of_long_sequences_that_does_not_fit_is_sent_to_more_parts() -> None:
    longer = ("data.sequence_length=327680", "model.max_position_embeddings=327680")
    large = run("parallel.tensor=1", "zero.stage=3", "train.recompute=offload", *longer)
    with pytest.raises(UserError, match=r"nearest that fits: parallel\.context=2$"):
        refuse_too_large(large, 8, find_gpu("a100-40g"))
    keys = {one.words for one in single_changes(run("parallel.context=2"), 16, 8)}
    assert {"parallel.context=4", "parallel.context=1"} <= keys


def test_the_reports_name_what_cuts_the_sequence() -> None:
    words = [str(CONFIGS / "8b.yaml"), *LONG, "parallel.tensor=8", "parallel.context=16", "--gpus=256", "--gpu=h100"]
    step = planned(*words)["step_time"]
    total, compute = step.pop("total"), step.pop("compute")
    assert sum(step.values()) == pytest.approx(total)
    assert compute + step["context"] < total
    said = CliRunner().invoke(app, ["plan", *words]).stdout
    assert "dp 2, cp 16 gather," in " ".join(said.split())
    assert f"context {100 * step['context'] / total:.0f} %" in said


@pytest.mark.parametrize("name", ["8b", "405b"])
def test_long_plans_in_the_docs_are_what_is_printed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(CONFIGS).parent
    monkeypatch.chdir(root)
    block = rf"^\$ (megallama plan configs/{name}\.yaml data\.sequence_length=131072 [^\n]*)\n(.*?)^```$"
    found = re.search(block, (root / "docs" / "planning.md").read_text(), re.M | re.S)
    assert found is not None
    printed = CliRunner().invoke(app, found[1].split()[1:])
    assert printed.stdout + (f"megallama: {printed.exception}\n" if printed.exception else "") == found[2]
