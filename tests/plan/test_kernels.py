"""What kernels compute and move: the counts add up to those of MFU, and are cut as the layout cuts the model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megallama.plan.time.kernels import kernel_work
from megallama.plan.time.workload import Shape, Workload

LLAMA_8B = Shape(32, 4096, 14336, 4096, 1024, 128256)
ONE = Workload(LLAMA_8B, sequence_length=8192, micro_batch_size=2, micro_batches=1)
TOKENS = 2 * 8192


def test_matmuls_are_those_of_mfu_and_attention_is_seven_sixths_of_the_causal_half() -> None:
    (found,) = kernel_work(ONE)
    matmuls = 6 * 7_504_658_432
    assert found.matmul_flops == TOKENS * matmuls
    causal = LLAMA_8B.flops_per_token(8192, "causal") - matmuls
    assert found.attention_flops == pytest.approx(TOKENS * causal * 7 / 6)


def test_bytes_of_one_layer_by_hand() -> None:
    """32 h + 8 (query + key width) + 16 f per token fused; each matmul moves its three matrices in each of 3 passes."""
    two, one = (kernel_work(replace(ONE, layers_by_rank=(layers,), fused=True))[0] for layers in (2, 1))
    assert two.other_bytes - one.other_bytes == TOKENS * (32 * 4096 + 8 * (4096 + 1024) + 16 * 14336)
    widths = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]
    assert two.matmul_bytes - one.matmul_bytes == 3 * 2 * sum(TOKENS * (a + b) + a * b for a, b in widths)


def test_ranks_of_a_pipeline_share_out_the_layers_and_one_has_the_head() -> None:
    whole = kernel_work(ONE)[0]
    ranks = kernel_work(replace(ONE, layers_by_rank=(10, 9, 9, 4)))
    for field in ("matmul_flops", "attention_flops", "matmul_bytes", "other_bytes"):
        assert sum(getattr(rank, field) for rank in ranks) == pytest.approx(getattr(whole, field))
    head = TOKENS * 6 * 128256 * 4096
    assert ranks[3].matmul_flops - head == pytest.approx(4 / 9 * ranks[1].matmul_flops)
    front = kernel_work(replace(ONE, layers_by_rank=(4, 9, 9, 10), head_rank=0))
    assert front[0] == ranks[3]


def test_tensor_parallelism_cuts_flops_and_leaves_norms_whole_without_sequence_parallelism() -> None:
    one, cut = kernel_work(ONE)[0], kernel_work(replace(ONE, tp=8, sequence_parallel=True))[0]
    assert cut.matmul_flops == one.matmul_flops / 8
    assert cut.attention_flops == one.attention_flops / 8
    assert cut.other_bytes == one.other_bytes / 8
    whole_norms = kernel_work(replace(ONE, tp=8))[0].other_bytes
    assert whole_norms - cut.other_bytes == pytest.approx(7 / 8 * TOKENS * 32 * 252 * 4096)


def test_recomputation_adds_a_forward_of_the_layers_and_none_of_the_head() -> None:
    again = replace(ONE, matmul_recompute_fraction=1, attention_recompute_fraction=1, elementwise_recompute_fraction=1)
    (plain,), (full,) = kernel_work(ONE), kernel_work(again)
    head = TOKENS * 6 * 128256 * 4096
    assert full.matmul_flops - head == pytest.approx(4 / 3 * (plain.matmul_flops - head))
    assert full.attention_flops == pytest.approx(9 / 7 * plain.attention_flops)


def test_fp32_moves_twice_the_bytes() -> None:
    (half,), (whole,) = kernel_work(ONE), kernel_work(replace(ONE, element_bytes=4))
    assert whole.other_bytes == 2 * half.other_bytes
    assert whole.matmul_bytes == 2 * half.matmul_bytes


def test_selective_recomputation_forms_the_product_of_gate_and_up_again_and_nothing_else() -> None:
    (plain,), (selective,) = kernel_work(ONE), kernel_work(replace(ONE, activation_recompute_fraction=1))
    assert selective.other_bytes - plain.other_bytes == pytest.approx(TOKENS * 32 * 10 * 14336)
    assert replace(selective, other_bytes=plain.other_bytes) == plain
