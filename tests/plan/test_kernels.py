"""What kernels compute and move: the counts add up to those of MFU, and are cut as the layout cuts the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.layout.counts import flops_per_token
from megallama.plan.memory.activations import tensors
from megallama.plan.time.kernels import KernelWork, head_work, layer_work
from megallama.plan.time.software import known_software

CONFIGS = Path(__file__).parents[2] / "configs"
TOKENS = 2 * 8192
PLAIN = ["parallel.tensor=1", "parallel.pipeline=1", "train.micro_batch_size=2", "train.recompute=none"]


def run(*words: str) -> RunConfig:
    """An 8B on one GPU, in micro-batches of two sequences of 8,192 tokens."""
    return load_config(CONFIGS / "8b.yaml", [*PLAIN, "train.compile=false", "data.sequence_length=8192", *words])


def work(*words: str, software: str = "megallama") -> tuple[KernelWork, KernelWork]:
    """A layer, and the head."""
    config, of = run(*words), tensors(run(*words))
    return layer_work(config, of, known_software()[software]), head_work(config, of, known_software()[software])


def test_matmuls_are_those_of_mfu_and_attention_is_seven_sixths_of_the_causal_half() -> None:
    (layer, head), model = work(), run().model
    matmuls = 6 * 7_504_658_432
    assert 32 * layer.matmul_flops + head.matmul_flops == TOKENS * matmuls
    causal = flops_per_token(model, 8192, "causal") - matmuls
    assert 32 * layer.attention_flops == pytest.approx(TOKENS * causal * 7 / 6)


WIDTHS = [(4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)]
MATMULS = 3 * 2 * sum(TOKENS * (a + b) + a * b for a, b in WIDTHS)
BYTES = {
    # of norms, rotations and activation per token: 44 or 32 h, 60 or 8 (query + key width), 28 or 16 f
    "separate": ([], 44 * 4096 + 60 * 5120 + 28 * 14336),
    "compiled": (["train.compile=true"], 32 * 4096 + 8 * 5120 + 16 * 14336),
    "on a CPU": (["train.device=cpu"], 252 * 4096 + 60 * 5120 + 28 * 14336),
    "norms of queries and keys": (["model.qk_norm=true"], 44 * 4096 + 70 * 5120 + 28 * 14336),
    "these on a CPU": (["model.qk_norm=true", "train.device=cpu"], 252 * 4096 + 174 * 5120 + 28 * 14336),
    "compiled, product and norms again": (
        ["train.compile=true", "train.recompute=selective"],
        40 * 4096 + 8 * 5120 + 22 * 14336,
    ),
    "the product again": (["train.recompute=selective"], 44 * 4096 + 60 * 5120 + 38 * 14336),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes_of_one_layer_by_hand(case: str) -> None:
    """Each matmul moves its three matrices in each of 3 passes."""
    words, each = BYTES[case]
    assert work(*words)[0].bytes_moved == pytest.approx(MATMULS + TOKENS * each)


def test_a_gpt_has_two_matrices_and_rotates_nothing() -> None:
    llama, gpt = work()[0], work("model.block=gpt")[0]
    assert llama.matmul_flops - gpt.matmul_flops == TOKENS * 6 * 4096 * 14336
    up = 3 * 2 * (TOKENS * 14336 + 4096 * 14336)
    assert llama.bytes_moved - gpt.bytes_moved == pytest.approx(up + TOKENS * (60 * 5120 + 18 * 14336))


def test_tensor_parallelism_cuts_all_but_norms_and_sequence_parallelism_these_as_well() -> None:
    one, cut = work()[0], work("parallel.tensor=8", "parallel.sequence=true")[0]
    whole = work("parallel.tensor=8", "parallel.sequence=false")[0]
    assert cut.matmul_flops == one.matmul_flops / 8
    assert cut.attention_flops == one.attention_flops / 8
    assert whole.bytes_moved - cut.bytes_moved == pytest.approx(7 / 8 * TOKENS * 44 * 4096)


AGAIN = {
    # Shares of the forward that a backward computes again: matmuls but for the down projection, attention.
    "full": (["train.recompute=full"], "megallama", 1 - 4096 * 14336 / 218_103_808, 1),
    "full, in each part of a backward": (
        ["train.recompute=full", "parallel.pipeline=2", "parallel.schedule=zbvzerobubble"],
        "megallama",
        2 - 2 * 4096 * 14336 / 218_103_808,
        2,
    ),
    "every second matmul": (["train.recompute=selective"], "torchtitan-2025", 0.5, 0),
    "attention alone": (["train.recompute=selective"], "megatron-2024", 0, 1),
}


@pytest.mark.parametrize("case", AGAIN)
def test_recomputation_adds_a_part_of_the_forward_of_layers_and_none_of_the_head(case: str) -> None:
    words, software, matmuls, attention = AGAIN[case]
    (plain, head), (again, same) = work(software=software), work(*words, software=software)
    assert again.matmul_flops == pytest.approx((3 + matmuls) / 3 * plain.matmul_flops)
    assert again.attention_flops == pytest.approx((7 + 2 * attention) / 7 * plain.attention_flops)
    assert same == head


def test_fp32_moves_twice_the_bytes() -> None:
    half, whole = work(), work("train.dtype=fp32")
    assert [each.bytes_moved for each in whole] == [2 * each.bytes_moved for each in half]


def test_a_fused_loss_moves_eight_bytes_a_logit_and_torchs_own_52() -> None:
    separate, fused = (work(software=name)[1].bytes_moved for name in ("megallama", "llm.c"))
    assert separate - fused == TOKENS * 44 * 128256
