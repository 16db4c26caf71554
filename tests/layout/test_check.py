"""Every combination that cannot run is refused with its keys, its arithmetic and a fix that works."""

from __future__ import annotations

from pathlib import Path

import pytest

from megallama.config.load import load_config
from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.budget import Seen
from megallama.layout.check import check_config, check_training
from megallama.layout.compiled import compiles, compiles_layers

RUN = """\
model: {vocab_size: 100, hidden_size: 192, intermediate_size: 512, num_hidden_layers: 4, num_attention_heads: 12,
  num_key_value_heads: 4}
data: {path: corpus, sequence_length: 120}
train: {steps: 100, micro_batch_size: 2, global_batch_size: 16}
"""


def run(folder: Path, overrides: list[str]) -> RunConfig:
    path = folder / "run.yaml"
    path.write_text(RUN)
    return load_config(path, overrides)


Refusal = tuple[list[str], int, str, list[tuple[list[str], int]]]
"""Overrides, world size, what the sentence must say, and (overrides, world size) that follow its advice."""


def check_refusal(folder: Path, refusal: Refusal) -> None:
    """The run is refused in that one sentence, and passes as each of its advices has it."""
    overrides, world_size, sentence, fixes = refusal
    with pytest.raises(UserError) as error:
        check_config(run(folder, overrides), world_size)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
    for legal, ranks in fixes:
        check_config(run(folder, legal), ranks)


REFUSED: list[Refusal] = [
    (["parallel.tensor=5"], 5, "parallel.tensor=5 does not divide model.num_attention_heads=12; nearest legal: 4",
     [(["parallel.tensor=4"], 4)]),
    (["parallel.tensor=3", "model.num_key_value_heads=4"], 3,
     "parallel.tensor=3 does not divide model.num_key_value_heads * head size = 4 * 16 = 64; nearest legal: 2 or 4",
     [(["parallel.tensor=2"], 2), (["parallel.tensor=4"], 4)]),
    (["parallel.tensor=4", "model.intermediate_size=510"], 4,
     "parallel.tensor=4 does not divide model.intermediate_size=510; nearest legal: 2",
     [(["parallel.tensor=2", "model.intermediate_size=510"], 2)]),
    (["parallel.tensor=4", "data.sequence_length=126"], 4,
     "parallel.tensor=4 does not divide data.sequence_length=126, which parallel.sequence cuts; nearest legal: 2",
     [(["parallel.tensor=2", "data.sequence_length=126"], 2),
      (["parallel.tensor=4", "data.sequence_length=126", "parallel.sequence=false"], 4)]),
    (["model.rope_scaling={rope_type: llama3, factor: 8, low_freq_factor: 4, high_freq_factor: 4}"], 1,
     "model.rope_scaling.high_freq_factor=4 is not above low_freq_factor=4; Llama 3.1 has high_freq_factor=4 and "
     "low_freq_factor=1",
     [(["model.rope_scaling={rope_type: llama3, factor: 8, low_freq_factor: 1, high_freq_factor: 4}"], 1)]),
    (["model.num_key_value_heads=5"], 1,
     "model.num_key_value_heads=5 does not divide model.num_attention_heads=12; nearest legal: 4 or 6",
     [(["model.num_key_value_heads=4"], 1), (["model.num_key_value_heads=6"], 1)]),
    (["model.hidden_size=200"], 1,
     "model.num_attention_heads=12 does not divide model.hidden_size=200; nearest legal: "
     "model.hidden_size=192 or 216, or give model.head_dim",
     [(["model.hidden_size=192"], 1), (["model.hidden_size=216"], 1),
      (["model.hidden_size=200", "model.head_dim=16"], 1)]),
    (["model.hidden_size=204"], 1, "204 / 12 = 17 is odd, and rotary embedding turns pairs; nearest legal: "
     "model.hidden_size=192 or 216", [(["model.hidden_size=192"], 1), (["model.hidden_size=216"], 1)]),
    (["model.head_dim=15"], 1, "model.head_dim=15 is odd, and rotary embedding turns pairs; nearest legal: 14 or 16",
     [(["model.head_dim=14"], 1), (["model.head_dim=16"], 1)]),
    (["zero.stage=0"], 1, "zero.stage=0 is not offered: at dp 1 stage 1 is the same; use zero.stage=1",
     [(["zero.stage=1"], 1)]),
    (["zero.stage=2", "parallel.pipeline=2"], 2,
     "zero.stage=2 does not go with parallel.pipeline=2; use zero.stage=1, or parallel.pipeline=1",
     [(["zero.stage=1", "parallel.pipeline=2"], 2), (["zero.stage=2", "parallel.pipeline=1"], 2)]),
    (["zero.stage=2", "zero.offload_optimizer=cpu"], 1,
     "zero.offload_optimizer=cpu does not go with zero.stage=2; use zero.stage=1, or zero.offload_optimizer=none",
     [(["zero.stage=1", "zero.offload_optimizer=cpu"], 1), (["zero.stage=2"], 1)]),
    (["zero.stage=3", "parallel.pipeline=2"], 2, "zero.stage=3 does not go with parallel.pipeline=2",
     [(["zero.stage=1", "parallel.pipeline=2"], 2)]),
    (["parallel.pipeline=8"], 8, "model.num_hidden_layers=4 is fewer than parallel.pipeline * chunks of 1f1b = "
     "8 * 1 = 8 stages; nearest legal for a world size of 8: parallel.pipeline=4", [(["parallel.pipeline=4"], 8)]),
    # Seven layers would fit 7 stages, but 8 and 12 ranks are no multiple of 7.
    (["model.num_hidden_layers=7", "parallel.pipeline=8"], 8, "nearest legal for a world size of 8: "
     "parallel.pipeline=4", [(["model.num_hidden_layers=7", "parallel.pipeline=4"], 8)]),
    (["model.num_hidden_layers=7", "parallel.pipeline=12"], 12, "nearest legal for a world size of 12: "
     "parallel.pipeline=6",
     # 6 stages and the dp of 2 ask for another batch as well.
     [(["model.num_hidden_layers=7", "parallel.pipeline=6", "train.global_batch_size=24"], 12)]),
    (["model.num_hidden_layers=7", "parallel.tensor=4", "parallel.pipeline=9"], 36,
     "nearest legal for a world size of 36: parallel.pipeline=3",
     # At pipeline 3 the dp of 3 asks for another batch as well.
     [(["model.num_hidden_layers=7", "parallel.tensor=4", "parallel.pipeline=3", "train.global_batch_size=18"], 36)]),
    (["model.num_hidden_layers=1", "parallel.pipeline=3", "parallel.schedule=dualpipev"], 3,
     "nearest legal for a world size of 3: parallel.pipeline=1",
     [(["model.num_hidden_layers=1", "parallel.schedule=dualpipev", "train.global_batch_size=18"], 3)]),
    (["parallel.pipeline=4", "parallel.schedule=dualpipev"], 4,
     "model.num_hidden_layers=4 is fewer than parallel.pipeline * chunks of dualpipev = 4 * 2 = 8 stages; "
     "nearest legal for a world size of 4: parallel.pipeline=2",
     [(["parallel.pipeline=2", "parallel.schedule=dualpipev"], 4)]),
    (["parallel.pipeline=2", "model.tie_word_embeddings=true"], 2,
     "model.tie_word_embeddings=true with parallel.pipeline=2 under 1f1b puts one weight on two ranks; "
     "use parallel.schedule=zbvzerobubble or dualpipev, whose V ends where it began, or parallel.pipeline=1",
     [(["parallel.pipeline=2", "model.tie_word_embeddings=true", "parallel.schedule=zbvzerobubble"], 2),
      (["parallel.pipeline=2", "model.tie_word_embeddings=true", "parallel.schedule=dualpipev"], 2),
      (["model.tie_word_embeddings=true"], 2)]),
    (["train.matmul=fp8", "train.dtype=fp32"], 1,
     "train.matmul=fp8 does not go with train.dtype=fp32, whose products are in fp32; use train.dtype=bf16, or "
     "train.matmul=dtype",
     [(["train.matmul=fp8", "train.dtype=bf16"], 1), (["train.matmul=dtype", "train.dtype=fp32"], 1)]),
    (["train.matmul=fp8", "parallel.tensor=2", "model.intermediate_size=528"], 2,
     "train.matmul=fp8 multiplies matrices whose sides are multiples of 16, and model.intermediate_size / "
     "parallel.tensor = 264; nearest legal: 256 or 272, or train.matmul=dtype",
     [(["train.matmul=fp8", "parallel.tensor=2", "model.intermediate_size=512"], 2),
      (["train.matmul=fp8", "parallel.tensor=2", "model.intermediate_size=544"], 2)]),
    (["train.matmul=fp8", "data.sequence_length=100"], 1,
     "train.micro_batch_size * data.sequence_length / parallel.context = 200; nearest legal: 192 or 208",
     [(["train.matmul=fp8", "data.sequence_length=96"], 1), (["train.matmul=fp8", "data.sequence_length=104"], 1)]),
    (["train.matmul=fp8", "train.recompute=full", "model.intermediate_size=2097152"], 1,
     "train.matmul=fp8 does not go with train.recompute=full for so many tokens, of which the MLP is computed in tiles",
     [(["train.matmul=fp8", "train.recompute=full", "model.intermediate_size=2097152", "train.micro_batch_size=1",
        "data.sequence_length=32"], 1),
      (["train.recompute=full", "model.intermediate_size=2097152"], 1)]),
    (["parallel.pipeline=2", "parallel.schedule=dualpipev", "train.compile=true"], 2,
     "train.compile=true does not go with parallel.schedule=dualpipev, which runs a backward in two parts; "
     "use train.compile=auto, or parallel.schedule=interleaved1f1b",
     [(["parallel.pipeline=2", "parallel.schedule=interleaved1f1b", "train.compile=true"], 2),
      (["parallel.pipeline=2", "parallel.schedule=dualpipev"], 2)]),
    (["parallel.pipeline=2", "parallel.layers_per_stage=[3, 2]"], 2,
     "parallel.layers_per_stage=[3, 2] has 2 stages and 5 layers; parallel.pipeline * chunks of 1f1b = 2 * 1 = 2 and "
     "model.num_hidden_layers=4, so use for example [2, 2]",
     [(["parallel.pipeline=2", "parallel.layers_per_stage=[2, 2]"], 2)]),
    (["parallel.layers_per_stage=[2, 2]"], 1,
     "parallel.layers_per_stage=[2, 2] has 2 stages and 4 layers; parallel.pipeline * chunks of 1f1b = 1 * 1 = 1 and "
     "model.num_hidden_layers=4, so use for example [4]", [(["parallel.layers_per_stage=[4]"], 1)]),
    (["parallel.layers_per_stage=[5]"], 1, "parallel.layers_per_stage=[5] has 1 stages and 5 layers; ",
     [(["parallel.layers_per_stage=[4]"], 1)]),
    (["parallel.pipeline=2", "parallel.schedule=interleaved1f1b", "model.tie_word_embeddings=true"], 2,
     "under interleaved1f1b puts one weight on two ranks", [(["parallel.pipeline=2"], 2)]),
    (["parallel.context=8"], 8, "data.sequence_length=120 is not a multiple of 2 * parallel.context = 2 * 8 = 16, "
     "the slices that context parallelism cuts; nearest legal: data.sequence_length=112 or 128, or parallel.context=6 "
     "or 10",
     [(["parallel.context=8", "data.sequence_length=112"], 8), (["parallel.context=8", "data.sequence_length=128"], 8),
      (["parallel.context=6"], 6), (["parallel.context=10"], 10)]),
    # Four tensor-parallel ranks cut a part of the sequence again; 128 is more than the model takes.
    (["parallel.context=8", "parallel.tensor=4", "model.max_position_embeddings=127"], 32,
     "nearest legal: data.sequence_length=96, or parallel.context=6 or 10",
     [(["parallel.context=8", "parallel.tensor=4", "data.sequence_length=96"], 32),
      (["parallel.context=6", "parallel.tensor=4"], 24), (["parallel.context=10", "parallel.tensor=4"], 40)]),
    (["parallel.context=4", "parallel.tensor=4"], 16, "parallel.tensor=4 does not divide data.sequence_length / "
     "parallel.context = 120 / 4 = 30, which parallel.sequence cuts; nearest legal: 2",
     [(["parallel.context=4", "parallel.tensor=2"], 8),
      (["parallel.context=4", "parallel.tensor=4", "parallel.sequence=false"], 16)]),
    (["parallel.context=3", "parallel.context_mode=ulysses"], 3, "parallel.context=3 does not divide "
     "model.num_key_value_heads / parallel.tensor = 4 / 1 = 4, the heads of each rank, which "
     "parallel.context_mode=ulysses cuts; nearest legal: parallel.context=2 or 4, or parallel.context_mode=gather",
     [(["parallel.context=2", "parallel.context_mode=ulysses"], 2),
      (["parallel.context=4", "parallel.context_mode=ulysses"], 4),
      (["parallel.context=3", "train.global_batch_size=18"], 3)]),
    # One key head over two tensor-parallel ranks is picked once for each of their six query heads.
    (["parallel.context=5", "parallel.context_mode=ulysses", "parallel.tensor=2", "model.num_key_value_heads=1"], 10,
     "does not divide model.num_attention_heads / parallel.tensor = 12 / 2 = 6, the heads of each rank, which "
     "parallel.context_mode=ulysses cuts; nearest legal: parallel.context=3 or 6",
     [(["parallel.context=3", "parallel.context_mode=ulysses", "parallel.tensor=2", "model.num_key_value_heads=1"], 6),
      (["parallel.context=6", "parallel.context_mode=ulysses", "parallel.tensor=2", "model.num_key_value_heads=1"], 12),
      ]),
    (["data.sequence_length=4096"], 1, "data.sequence_length=4096 is more than model.max_position_embeddings=2048; "
     "nearest legal: data.sequence_length=2048, or model.max_position_embeddings=4096",
     [(["data.sequence_length=2048"], 1), (["data.sequence_length=4096", "model.max_position_embeddings=4096"], 1)]),
    (["train.stop_after=101"], 1, "train.stop_after=101 is more than train.steps=100; nearest legal: "
     "train.stop_after=100", [(["train.stop_after=100"], 1)]),
    (["schedule.warmup_steps=100"], 1, "schedule.warmup_steps=100 leaves nothing of train.steps=100; nearest legal: "
     "schedule.warmup_steps=99, or train.steps=101",
     [(["schedule.warmup_steps=99"], 1), (["schedule.warmup_steps=100", "train.steps=101"], 1)]),
    (["schedule.kind=wsd", "schedule.warmup_steps=50", "schedule.decay_steps=60"], 1,
     "schedule.warmup_steps + schedule.decay_steps = 50 + 60 = 110 is more than train.steps=100; nearest legal: "
     "schedule.decay_steps=50", [(["schedule.kind=wsd", "schedule.warmup_steps=50", "schedule.decay_steps=50"], 1)]),
    (["schedule.min_lr=1e-3"], 1, "schedule.min_lr=0.001 is more than optimizer.lr=0.0003; nearest legal: "
     "schedule.min_lr=0.0003", [(["schedule.min_lr=0.0003"], 1)]),
    (["train.steps=chinchilla", "train.stop_after=1000000000"], 1, "is more than train.steps=chinchilla = ",
     [(["train.steps=chinchilla", "train.stop_after=10"], 1)]),
    # 16 * 120 tokens a step.
    (["train.steps=null", "train.tokens=192_001", "train.stop_after=102"], 1, "train.stop_after=102 is more than "
     "train.tokens=192001 = 101 steps; nearest legal: train.stop_after=101",
     [(["train.steps=null", "train.tokens=192_001", "train.stop_after=101"], 1)]),
    (["train.steps=null", "train.tokens=192_001", "schedule.warmup_steps=101"], 1, "schedule.warmup_steps=101 leaves "
     "nothing of train.tokens=192001 = 101 steps; nearest legal: schedule.warmup_steps=100, or train.tokens=195840",
     [(["train.steps=null", "train.tokens=192_001", "schedule.warmup_steps=100"], 1),
      (["train.steps=null", "train.tokens=195840", "schedule.warmup_steps=101"], 1)]),
    (["train.steps=null", "train.tokens=192K", "schedule.kind=wsd", "schedule.warmup_steps=50",
      "schedule.decay_steps=60"], 1, "= 50 + 60 = 110 is more than train.tokens=192000 = 100 steps; nearest legal: "
     "schedule.decay_steps=50",
     [(["train.steps=null", "train.tokens=192K", "schedule.kind=wsd", "schedule.warmup_steps=50",
        "schedule.decay_steps=50"], 1)]),
]  # fmt: skip


@pytest.mark.parametrize("refusal", REFUSED, ids=[f"{row[0]} on {row[1]}" for row in REFUSED])
def test_a_refusal_names_keys_and_numbers_and_its_advice_passes(tmp_path: Path, refusal: Refusal) -> None:
    check_refusal(tmp_path, refusal)


def test_compiled_layers_are_planned_at_zero_3_and_not_trained(tmp_path: Path) -> None:
    config = run(tmp_path, ["zero.stage=3", "train.compile=true"])
    check_config(config, 1)
    with pytest.raises(UserError, match=r"^train\.compile=true gains nothing at zero\.stage=3, .*use zero\.stage=2"):
        check_training(config, 1)


def test_layers_that_torch_would_keep_whole_are_not_compiled(tmp_path: Path) -> None:
    cut = ["parallel.tensor=2", "train.compile=true"]
    with pytest.raises(UserError, match=r"at parallel\.tensor=2, where .* or parallel\.sequence=false$"):
        check_training(run(tmp_path, cut), 2)
    check_training(run(tmp_path, [*cut, "parallel.sequence=false"]), 2)
    by_default = run(tmp_path, cut[:1])
    assert compiles(by_default, on_gpu=True) and not compiles_layers(by_default, on_gpu=True)


def test_layers_whose_mlp_is_in_tiles_are_not_compiled(tmp_path: Path) -> None:
    tokens = ["data.sequence_length=32768", "model.max_position_embeddings=32768", "train.micro_batch_size=8"]
    many = [*tokens, "train.recompute=full"]
    with pytest.raises(UserError, match=r"train\.recompute=full for so many tokens, .* or train\.recompute=selective$"):
        check_training(run(tmp_path, [*many, "train.compile=true"]), 2)
    check_training(run(tmp_path, [*tokens, "train.recompute=selective", "train.compile=true"]), 2)
    by_default = run(tmp_path, many)
    assert compiles(by_default, on_gpu=True) and not compiles_layers(by_default, on_gpu=True)
    assert compiles_layers(run(tmp_path, [*many, "train.micro_batch_size=2"]), on_gpu=True)


def test_a_length_in_tokens_is_checked_with_the_steps_that_it_takes_from_where_the_run_is(tmp_path: Path) -> None:
    """3,064 sequences by 8: 383 steps. After 120 of them by 16: 252, while a new run by 16 takes 192."""
    by_16 = ["train.steps=null", f"train.tokens={3064 * 120}", "schedule.warmup_steps=200"]
    going_on, seen = run(tmp_path, [*by_16, "train.stop_after=252"]), Seen(120, 960, 8)
    check_config(going_on, 1, seen)
    with pytest.raises(UserError, match=r"stop_after=253 is more than train.tokens=367680 = 252 steps; .*=252$"):
        check_config(run(tmp_path, [*by_16, "train.stop_after=253"]), 1, seen)
    with pytest.raises(UserError, match=r"stop_after=252 is more than train.tokens=367680 = 192 steps"):
        check_config(going_on, 1)
    with pytest.raises(UserError, match=r"warmup_steps=200 leaves nothing of train.tokens=367680 = 192 steps"):
        check_config(run(tmp_path, by_16), 1)
