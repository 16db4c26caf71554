"""Layouts by name: what is refused, before anything trains, and that each is trained once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.check import check_training
from megallama.layout.names import DEFAULT_LAYOUTS, default_layouts, layout_of, parse_layout
from megallama.verify.shrink import shrink, shrink_model
from megallama.verify.verify import layers_for, verify
from tests.verify.test_parity import assert_all_equal, debug_config

MISTAKES = {
    "zero9": "unknown word 'zero9' in layout 'zero9'; a layout is made of tpN, ppN, dpN, cpN and accN with N "
    "from 1, zeroN with N from 1 to 3, ",
    "zero0": "unknown word 'zero0'",
    "tp0": "unknown word 'tp0'",
    "dp2-acc0": "unknown word 'acc0' in layout 'dp2-acc0'",
    "dp0": "unknown word 'dp0'",
    "tp3": "layout tp3-zero1, of the shrunk run: parallel.tensor=3 does not divide model.num_attention_heads=8; "
    "nearest legal: 2 or 4",
    "tp16": "layout tp16-zero1, of the shrunk run: parallel.tensor=16 does not divide model.num_attention_heads=8",
    "pp2-zero2": "layout pp2-zero2, of the shrunk run: zero.stage=2 does not go with parallel.pipeline=2",
    "pp2-dualpipev-acc3": "layout pp2-dualpipev-zero1-acc3, of the shrunk run: train.global_batch_size / ",
    "pp2-interleaved1f1b-chunks1": "unknown word 'chunks1'",
    "pp2-chunks3": "chunks3 in layout 'pp2-chunks3' goes with interleaved1f1b only, and its schedule is 1f1b; "
    "use pp2-interleaved1f1b-chunks3-zero1, or leave it out",
    "pp2-chunks2-dualpipev": "chunks2 in layout 'pp2-chunks2-dualpipev' goes with interleaved1f1b only",
    "pp2-split1+1+1": "layout pp2-split1+1+1-zero1, of the shrunk run: parallel.layers_per_stage=[1, 1, 1] has 3 ",
    "pp2-split1+3,pp2-split2+3": "layout pp2-split1+3-zero1 needs 4 layers and layout pp2-split2+3-zero1 needs 5, and ",
    "pp4-dualpipev,pp2-split1+3": "layout pp2-split1+3-zero1 needs 4 layers and layout pp4-dualpipev-zero1 needs 8 or "
    "more, and the shrunk run has one number of layers for all; verify them by two commands, or write splits of the "
    "same sum",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_layout_that_cannot_run_is_refused_before_anything_trains(name: str) -> None:
    trained: list[str] = []
    with pytest.raises(UserError) as refused:
        verify(debug_config(), [parse_layout(word) for word in ("dp2", *name.split(","))], progress=trained.append)
    assert MISTAKES[name] in str(refused.value)
    assert "\n" not in str(refused.value)
    assert trained == []


def test_chunks_stand_in_the_name_where_they_are_not_two() -> None:
    assert parse_layout("pp2-chunks3-interleaved1f1b").name == "pp2-interleaved1f1b-chunks3-zero1"
    assert parse_layout("pp2-interleaved1f1b-chunks2").name == "pp2-interleaved1f1b-zero1"


@pytest.mark.parametrize("name", [*DEFAULT_LAYOUTS, "pp2-interleaved1f1b-chunks3", "pp2-split1+3-selective"])
def test_a_run_has_the_name_of_the_layout_that_made_it(name: str) -> None:
    layout = parse_layout(name)
    tree = debug_config().model_dump()
    layout.apply(tree)
    assert layout_of(RunConfig.model_validate(tree), layout.dp).name == layout.name


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        ("dp2,tp2", 2),
        ("pp2", 3),
        ("pp2,pp4", 5),
        ("pp4-dualpipev,pp2", 9),
        ("pp2-split1+3", 4),
        ("pp2-split1+3,pp4", 4),
        ("pp4,pp2-split4+2,pp2-split1+5,pp2-interleaved1f1b", 6),
    ],
)
def test_a_split_decides_how_many_layers_there_are_else_one_more_than_the_most_stages(names: str, layers: int) -> None:
    assert layers_for([parse_layout(name) for name in names.split(",")]) == layers


def test_a_layout_given_twice_is_trained_once() -> None:
    names = ["acc2", "zero1-acc2", "acc2-nosp"]
    report = verify(debug_config(), [parse_layout(name) for name in names], steps=1)
    assert_all_equal(report)
    assert [verdict.layout.name for verdict in report.verdicts] == ["zero1-acc2"]


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        pytest.param([], 25, id="debug"),
        pytest.param(["model.num_attention_heads=8", "model.num_key_value_heads=1"], 24, id="one key head"),
        pytest.param(["model.tie_word_embeddings=true"], 21, id="tied"),
    ],
)
def test_the_shrunk_run_can_run_at_every_default_layout(overrides: list[str], count: int, tmp_path: Path) -> None:
    config = debug_config(*overrides)
    layouts = default_layouts(shrink_model(config.model, 1))
    tree = shrink(config, tmp_path, tmp_path, 1, "fp32", layers_for(layouts)).model_dump()
    assert len(layouts) == count
    for layout in layouts:
        layout.apply(tree)
        check_training(RunConfig.model_validate(tree), layout.world_size)
