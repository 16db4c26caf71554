"""Which hashes must agree: copies on every rank, shards on the ranks of one tensor-parallel place."""

from __future__ import annotations

from megallama.layout.names import Layout
from megallama.verify.verify import unequal_copies

TP2_DP2 = Layout(tp=2, dp=2)


def ranks(copies: str, shards: str) -> list[dict[str, str]]:
    """A letter for each rank stands for the bits it holds; tp is the inner axis, so ranks 0 and 2 are one place."""
    return [{"copy norm": a, "shard qkv": b} for a, b in zip(copies, shards, strict=True)]


def test_shards_may_differ_over_tensor_parallel_ranks() -> None:
    assert unequal_copies(TP2_DP2, ranks("aaaa", "bcbc")) == []


def test_a_copy_that_differs_on_any_rank_is_named() -> None:
    for copies in ("xaaa", "axaa", "aaxa", "aaax"):
        assert unequal_copies(TP2_DP2, ranks(copies, "bcbc")) == ["copy norm differs between ranks"]


def test_a_shard_that_differs_over_data_parallel_copies_is_named() -> None:
    for shards in ("bcxc", "bcbx", "bbcc"):
        assert unequal_copies(TP2_DP2, ranks("aaaa", shards)) == ["shard qkv differs between ranks"]


def test_each_parameter_is_named_once_and_in_order() -> None:
    hashes = ranks("abcd", "abcd")
    assert unequal_copies(TP2_DP2, hashes) == ["copy norm differs between ranks", "shard qkv differs between ranks"]


def test_a_parameter_that_one_rank_alone_holds_whole_is_not_compared() -> None:
    assert unequal_copies(Layout(dp=2, zero=3), [{"copy norm": "a"}, {}]) == []
