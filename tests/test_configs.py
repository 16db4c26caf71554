"""Every recipe that is shipped loads, checks where it is meant to run, and has exactly the parameters it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megallama.config.load import dump_config, load_config
from megallama.layout.check import check_config
from megallama.layout.counts import count_parameters

CONFIGS = Path(__file__).parents[1] / "configs"

# Recipe: ranks it is meant for, micro-batches per step there, parameters. The small ones by hand, as
# layers * (2 * h * h + 2 * h * kv width + 3 * h * f + 2 * h) + h + vocabulary * h, twice if not tied.
SHIPPED = {
    "quickstart": (1, 1, 4 * (73_728 + 24_576 + 294_912 + 384) + 192 + 786_432),
    "debug": (1, 4, 2 * (8_192 + 4_096 + 36_864 + 128) + 64 + 2 * 16_448),
    "13m": (1, 4, 8 * (73_728 + 73_728 + 294_912 + 384) + 192 + 9_649_344),
    "tinystories-20m": (1, 4, 19_532_032),
    "llama3-mini": (1, 4, 8 * (165_888 + 82_944 + 663_552 + 576) + 288 + 2 * 1_179_648),
    "110m": (1, 16, 12 * (1_179_648 + 1_179_648 + 4_718_592 + 1_536) + 768 + 24_576_000),
    "125m": (8, 4, 12 * (1_179_648 + 1_179_648 + 4_718_592 + 1_536) + 768 + 38_597_376),
    "1b": (8, 16, 1_100_048_384),
    "2b": (8, 16, 24 * (13_107_200 + 13_107_200 + 53_084_160 + 5_120) + 2_560 + 2 * 128_657_920),
    "7b": (128, 16, 6_738_415_616),
    "8b": (64, 16, 8_030_261_248),
    "13b": (128, 64, 13_015_864_320),
    "70b": (512, 128, 70_553_706_496),
    "405b": (16_384, 16, 405_853_388_800),
}
LITERAL = {
    "quickstart": 2_361_024,
    "debug": 131_520,
    "13m": 13_191_552,
    "llama3-mini": 9_663_264,
    "110m": 109_529_856,
    "125m": 123_551_232,
    "2b": 2_160_606_720,
}


def test_every_recipe_is_listed_here() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(SHIPPED)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_checks_on_its_ranks_and_has_its_parameters(name: str) -> None:
    ranks, accumulation, parameters = SHIPPED[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    assert check_config(config, ranks).gradient_accumulation_steps == accumulation
    assert count_parameters(config.model).total == parameters == LITERAL.get(name, parameters)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_comment_at_the_top_tells_the_truth(name: str) -> None:
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert f"{SHIPPED[name][2]:,} parameters" in first


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recipe_is_complete_and_keeps_to_its_own_folders(name: str, tmp_path: Path) -> None:
    path = CONFIGS / f"{name}.yaml"
    config = load_config(path)
    assert set(yaml.safe_load(path.read_text())) == set(type(config).model_fields)
    assert config.run.dir == f"runs/{name}"
    assert config.data.path == f"data/{name}/corpus"
    assert config.train.dtype == ("fp32" if name in ("quickstart", "debug") else "bf16")
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config(tmp_path / "again.yaml") == config


def test_7b_is_the_run_that_its_launcher_describes() -> None:
    config = load_config(CONFIGS / "7b.yaml")
    batching = check_config(config, 16 * 8)
    assert (config.parallel.tensor, config.parallel.pipeline, batching.dp_size) == (2, 4, 16)
    assert (config.train.global_batch_size, config.data.sequence_length, config.train.micro_batch_size) == (
        1024,
        2048,
        4,
    )
    assert (config.train.steps, config.schedule.warmup_steps, config.schedule.kind) == (300_000, 2_000, "cosine")
    assert (config.optimizer.lr, config.schedule.min_lr) == (3e-4, 3e-5)
    assert (config.optimizer.clip, config.optimizer.betas, config.optimizer.weight_decay) == (1.0, (0.9, 0.95), 0.1)


@pytest.mark.parametrize("layout", [(2, 1), (2, 2), (4, 1), (1, 2)])
def test_debug_runs_at_any_layout_of_four_ranks(layout: tuple[int, int]) -> None:
    tensor, pipeline = layout
    config = load_config(CONFIGS / "debug.yaml", [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"])
    check_config(config, 4)
