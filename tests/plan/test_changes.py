"""Whether a run fits its GPUs, and what would."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.errors import UserError
from megallama.hardware.gpus import find_gpu
from megallama.layout.check import check_config
from megallama.plan.memory.ledger import rank_bytes
from megallama.plan.search.changes import nearest_change, refuse_too_large, single_changes
from megallama.plan.time.software import machine

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "overrides", "world_size", "gpu"),
    [
        ("7b", ["train.micro_batch_size=16"], 128, "a100-40g"),
        ("8b", ["parallel.tensor=1", "zero.stage=1"], 8, "h100"),
        ("8b", ["parallel.tensor=2", "train.micro_batch_size=1"], 8, "l40s"),
        ("70b", ["parallel.pipeline=1", "train.micro_batch_size=2"], 256, "a100-80g"),
        ("405b", ["train.recompute=none", "parallel.pipeline=8"], 16_384, "h100"),
    ],
)
def test_the_change_that_is_named_fits(name: str, overrides: list[str], world_size: int, gpu: str) -> None:
    path, device = str(CONFIGS / f"{name}.yaml"), find_gpu(gpu)
    config = load_config(path, overrides)
    check_config(config, world_size)
    with pytest.raises(UserError) as refused:
        refuse_too_large(config, world_size, device)
    sentence = str(refused.value)
    over = max(rank_bytes(config, world_size)) - device.usable_bytes
    assert f"{over / 2**30:.1f} GiB more than the " in sentence
    words = sentence.partition("nearest that fits: ")[2]
    assert words, sentence
    gpus = re.search(r"--gpus (\d+)", words)
    keys = re.findall(r"[a-z]+\.[a-z_]+=\w+", words)
    assert gpus or keys
    ranks = int(gpus[1]) if gpus else world_size
    changed = load_config(path, [*overrides, *keys])
    check_config(changed, ranks)
    assert max(rank_bytes(changed, ranks)) <= device.usable_bytes


def test_a_run_that_fits_is_not_refused() -> None:
    refuse_too_large(load_config(str(CONFIGS / "7b.yaml")), 128, find_gpu("a100-80g"))


def test_a_run_that_no_single_change_helps_is_sent_to_the_search() -> None:
    config = load_config(str(CONFIGS / "405b.yaml"), ["parallel.tensor=1", "parallel.pipeline=1"])
    with pytest.raises(UserError, match="no single change fits; try --search with more GPUs"):
        refuse_too_large(config, 8, find_gpu("h100"))


def test_tensor_parallelism_that_is_proposed_stays_within_a_node() -> None:
    config = load_config(str(CONFIGS / "8b.yaml"), ["parallel.tensor=2"])
    tried = [one.words for one in single_changes(config, 16, 4)]
    assert "parallel.tensor=4" in tried
    small = load_config(str(CONFIGS / "8b.yaml"), ["parallel.tensor=4", "train.global_batch_size=512"])
    assert "parallel.tensor=8" not in [one.words for one in single_changes(small, 16, 4)]
    whole_node = load_config(str(CONFIGS / "70b.yaml"), ["parallel.tensor=8", "parallel.pipeline=1"])
    with pytest.raises(UserError, match=r"nearest that fits: parallel\.pipeline=2 with --gpus 32$"):
        refuse_too_large(whole_node, 16, find_gpu("h100"))


@pytest.mark.parametrize("name", ["7b", "8b", "70b"])
def test_a_single_change_is_one_key_as_it_is_typed_and_what_it_comes_to(name: str) -> None:
    path, gpu = str(CONFIGS / f"{name}.yaml"), find_gpu("h100")
    found = single_changes(load_config(path), 256, 8)
    assert len({one.words for one in found}) == len(found) > 5
    for one in found:
        changed = load_config(path, [one.words])
        check_config(changed, 256)
        assert changed == one.config
        assert one.words.startswith(f"{one.key}=")
        assert load_config(path, [f"{one.key}={one.instead_of}"]) == load_config(path)
        assert one.size == max(rank_bytes(changed, 256))
        assert (one.seconds(machine(gpu)) or 0) > 0


def test_a_change_has_no_seconds_where_none_is_known_or_one_is_assumed_for_every_layout() -> None:
    config, gpu = load_config(str(CONFIGS / "7b.yaml")), find_gpu("h100")
    (first, *_) = single_changes(config, 128, 8)
    assert first.seconds(None) is None
    assert first.seconds(machine(gpu, mfu=0.4)) is None


@pytest.mark.parametrize("layers", ["[17,15]", "even"])
def test_the_layers_of_each_stage_stay_as_the_run_has_them(layers: str) -> None:
    words = ["parallel.pipeline=2", f"parallel.layers_per_stage={layers}"]
    config = load_config(str(CONFIGS / "8b.yaml"), words)
    found = single_changes(config, 16, 8)
    assert {one.config.parallel.layers_per_stage for one in found} == {config.parallel.layers_per_stage}
    pipelines = [one.words for one in found if one.key == "parallel.pipeline"]
    assert pipelines == ([] if layers != "even" else ["parallel.pipeline=4", "parallel.pipeline=1"])
    assert "parallel.tensor=4" in [one.words for one in found]


def test_a_list_of_layers_is_given_up_in_words_where_more_stages_are_what_fits() -> None:
    words = ["parallel.pipeline=2", "parallel.tensor=8", "parallel.layers_per_stage=[40,40]"]
    config = load_config(str(CONFIGS / "70b.yaml"), [*words, "train.recompute=full", "train.micro_batch_size=1"])
    with pytest.raises(UserError, match=r"parallel\.pipeline=4 parallel\.layers_per_stage=balanced"):
        refuse_too_large(config, 64, find_gpu("a100-40g"))


def test_the_change_that_a_run_out_of_memory_is_told_costs_the_least() -> None:
    found = nearest_change(load_config(str(CONFIGS / "7b.yaml")), 128)
    assert found is not None
    assert found.words == "train.micro_batch_size=2"
    assert found.size <= 0.9 * max(rank_bytes(load_config(str(CONFIGS / "7b.yaml")), 128))
