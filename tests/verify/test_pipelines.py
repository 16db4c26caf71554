"""Pipelines give the answer of one process: every schedule, at its fewest micro-batches and where rounds are uneven."""

from __future__ import annotations

import pytest

from megallama.layout.names import parse_layout
from megallama.verify.compare import BOUNDS
from megallama.verify.verify import verify
from tests.verify.test_parity import TIED, assert_all_equal, debug_config

# The fewest micro-batches that each schedule takes, and more that pp does not divide. Layouts of a group are held
# against one run of one process, as `megallama verify` does with several; it takes as long as one of them. With fewer
# micro-batches, interleaved1f1b on pp4 adds up the embedding's gradient of more tokens in bf16, beyond the bound.
GROUPS = [
    "pp2 pp2-interleaved1f1b pp2-dualpipev pp2-zbvzerobubble",
    "pp2-acc3 pp2-interleaved1f1b-acc3",
    "pp2-dualpipev-acc5 pp2-zbvzerobubble-acc5",
    "pp4 pp4-interleaved1f1b-acc4 pp4-dualpipev pp4-zbvzerobubble",
    "pp4-acc5 pp4-interleaved1f1b-acc5",
    "pp4-dualpipev-acc9 pp4-zbvzerobubble-acc9",
    "pp2-dp2 pp2-dualpipev-dp2 pp2-interleaved1f1b-chunks3-acc4",
    "tp2-pp2 tp2-pp2-nosp-selective tp2-pp2-interleaved1f1b-full",
    "tp2-pp2-zbvzerobubble-full tp2-pp2-dualpipev tp2-pp2-dp2",
    "pp2-split1+3",
    "pp2-zbvzerobubble-split1+4+2+1",
]
IN_EVERY_RUN = [
    ("pp2-acc3", "fp32"),
    ("pp2-interleaved1f1b-acc3", "fp32"),
    ("pp2-zbvzerobubble", "fp32"),
    ("tp2-pp2-dualpipev", "fp32"),
    ("pp2-dp2", "bf16"),
    ("pp2-dualpipev", "bf16"),
]


def check(layouts: str, dtype: str, *overrides: str, resume: bool = False) -> None:
    parsed = [parse_layout(name) for name in layouts.split()]
    assert_all_equal(verify(debug_config(*overrides), parsed, dtype=dtype, resume=resume))


@pytest.mark.parametrize(("layout", "dtype"), IN_EVERY_RUN)
def test_a_pipeline_gives_the_answer_of_one_process(layout: str, dtype: str) -> None:
    check(layout, dtype)


def rest_of(group: str, dtype: str) -> str:
    return " ".join(name for name in group.split() if (name, dtype) not in IN_EVERY_RUN)


@pytest.mark.layouts
@pytest.mark.parametrize(
    ("layouts", "dtype"),
    # Batches that stages do not divide, and stages of other lengths, are other orders of the same: one type shows it.
    [
        (rest, dtype)
        for dtype in BOUNDS
        for group in GROUPS
        if (rest := rest_of(group, dtype))
        and (dtype == "fp32" or not any(odd in group for odd in ("-acc5", "-acc9", "-split")))
    ],
)
def test_every_pipeline_gives_the_answer_of_one_process(layouts: str, dtype: str) -> None:
    check(layouts, dtype)


@pytest.mark.parametrize("schedule", ["dualpipev", "zbvzerobubble"])
def test_a_v_ties_its_ends(schedule: str) -> None:
    check(f"pp2-{schedule}", "fp32", TIED)


@pytest.mark.layouts
def test_a_v_ties_its_ends_in_bf16() -> None:
    check("pp2-dualpipev", "bf16", TIED)


@pytest.mark.layouts
def test_a_tied_v_whose_ends_are_cut_goes_on_where_one_process_stopped_and_the_other_way() -> None:
    check("tp2-pp2-zbvzerobubble", "fp32", TIED, resume=True)
