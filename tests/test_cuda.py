"""What only a GPU can show: that training runs there as on a CPU, and that its memory is what the plan says."""

from __future__ import annotations

import os
import pickle
import sys
from pathlib import Path

import pytest
import torch

from megallama.model.attention import _attend
from megallama.verify.compare import read_tensors
from tests.launching import PRETRAIN, arguments, events, execute
from tests.train.test_average import DECAY, EXPONENTIAL, LATEST, assert_exponential, assert_latest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch sees"),
]

LARGE = [
    "data.sequence_length=1024",
    "model.max_position_embeddings=1024",
    "model.vocab_size=32000",
    "model.hidden_size=1024",
    "model.intermediate_size=2816",
    "model.num_hidden_layers=8",
    "model.num_attention_heads=16",
    "model.num_key_value_heads=8",
    "train.micro_batch_size=8",
    "train.global_batch_size=16",
    "train.steps=12",
    "evaluation.every=0",
    "checkpoint.every=0",
]


LOSSES = ["train.steps=8", "train.micro_batch_size=1", "evaluation.every=0", "model.num_hidden_layers=4"]
DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count()))))


def train(dataset: str, run_dir: Path, home: Path, *more: str, ranks: int = 1) -> list[float]:
    """The losses of a run of that many ranks."""
    home.mkdir()
    launcher = ["torchrun", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else [sys.executable]
    command = [*launcher, PRETRAIN, *arguments(dataset, run_dir, *more)]
    done = execute(command, home, timeout=60, CUDA_VISIBLE_DEVICES=VISIBLE)
    assert done.code == 0, done.err
    return [event["loss"] for event in events(run_dir, "train")]


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_peak_is_what_the_plan_says(byte_dataset: str, tmp_path: Path, stage: int, recompute: str) -> None:
    more = [f"zero.stage={stage}", f"train.recompute={recompute}", "train.device=cuda", "train.dtype=bf16"]
    train(byte_dataset, tmp_path / "run", tmp_path / "home", *LARGE, *more)
    (forecast,) = events(tmp_path / "run", "forecast")
    error = forecast["predicted_memory_bytes"] / forecast["peak_memory_bytes"] - 1
    assert -0.03 <= error <= 0.05, forecast


@DTYPES
def test_losses_are_those_of_a_cpu(byte_dataset: str, tmp_path: Path, dtype: str, tolerance: float) -> None:
    more = [*LOSSES, f"train.dtype={dtype}"]
    cpu = train(byte_dataset, tmp_path / "cpu", tmp_path / "a", *more)
    cuda = train(byte_dataset, tmp_path / "cuda", tmp_path / "b", *more, "train.device=cuda")
    assert len(cuda) == 8
    assert cuda == pytest.approx(cpu, rel=tolerance)


@pytest.mark.parametrize("stage", [1, 3])
def test_averages_are_those_of_a_plain_loop(byte_dataset: str, tmp_path: Path, stage: int) -> None:
    """Also that of checkpoints, which lies on the host."""
    there = [f"zero.stage={stage}", "train.device=cuda", "train.dtype=bf16", "train.steps=6", "evaluation.every=2"]
    there += ["checkpoint.every=1", "checkpoint.keep=8"]
    train(byte_dataset, tmp_path / "exponential", tmp_path / "a", *there, *EXPONENTIAL)
    assert_exponential(tmp_path / "exponential", DECAY)
    train(byte_dataset, tmp_path / "latest", tmp_path / "b", *there, *LATEST)
    assert_latest(tmp_path / "latest")


@DTYPES
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("head_dim", [8, 16])  # one document at a time, and flex attention
def test_losses_within_documents_are_those_of_a_cpu(
    byte_dataset: str, tmp_path: Path, head_dim: int, compiled: bool, dtype: str, tolerance: float
) -> None:
    more = [*LOSSES, f"train.dtype={dtype}", f"model.head_dim={head_dim}", "data.document_mask=true"]
    more += ["data.sequence_length=192", "model.max_position_embeddings=192"]
    cpu = train(byte_dataset, tmp_path / "cpu", tmp_path / "a", *more)
    there = ["train.device=cuda", f"train.compile={str(compiled).lower()}"]
    cuda = train(byte_dataset, tmp_path / "cuda", tmp_path / "b", *more, *there)
    assert len(cuda) == 8
    assert cuda == pytest.approx(cpu, rel=tolerance)


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_queries_of_the_last_positions_attend_as_on_a_cpu(kv_heads: int) -> None:
    """By the kernel that is causal to the lower right, which ranks that share a sequence ask for."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, 64, 32), (2, kv_heads, 192, 32), (2, kv_heads, 192, 32), (2, 4, 64, 32))
    q, k, v, target = (torch.randn(*shape, generator=generator).to(torch.bfloat16) for shape in shapes)

    def attended(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        tensors = [each.to(device, dtype).requires_grad_() for each in (q, k, v)]
        out = _attend(*tensors, causal=True)
        return [out, *torch.autograd.grad((out * target.to(device, dtype)).sum(), tensors)]

    for found, expected in zip(attended("cuda", torch.bfloat16), attended("cpu", torch.float32), strict=True):
        torch.testing.assert_close(found.cpu().float(), expected, rtol=5e-2, atol=5e-2)


@DTYPES
def test_compiled_layers_have_the_losses_of_eager_ones(
    byte_dataset: str, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    more = [*LOSSES, "train.device=cuda", f"train.dtype={dtype}"]
    eager = train(byte_dataset, tmp_path / "eager", tmp_path / "a", *more)
    compiled = train(byte_dataset, tmp_path / "compiled", tmp_path / "b", *more, "train.compile=true")
    assert len(compiled) == 8
    assert compiled == pytest.approx(eager, rel=tolerance)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    "layout",
    [
        ["parallel.tensor=2", "parallel.sequence=false"],
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.pipeline=2"],
        ["parallel.pipeline=2", "parallel.schedule=zbvzerobubble"],
        ["zero.stage=2"],
        ["zero.stage=3"],
        ["parallel.context=2"],
        ["parallel.context=2", "parallel.context_mode=ulysses"],
        ["parallel.context=2", "data.document_mask=true", "model.head_dim=16"],
    ],
    ids=" ".join,
)
def test_two_gpus_have_the_losses_of_one(byte_dataset: str, tmp_path: Path, layout: list[str]) -> None:
    more = [*LOSSES, "train.device=cuda", "train.dtype=fp32"]
    alone = [word for word in layout if word.partition(".")[0] in ("data", "model")]
    one = train(byte_dataset, tmp_path / "one", tmp_path / "a", *more, *alone)
    two = train(byte_dataset, tmp_path / "two", tmp_path / "b", *more, *layout, ranks=2)
    assert len(two) == 8
    assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("history", [False, True])
def test_a_model_that_does_not_fit_ends_in_one_sentence(history: bool, byte_dataset: str, tmp_path: Path) -> None:
    """Its activations do not; a model of such weights would be refused for its checkpoints on a small disk."""
    home = tmp_path / "home"
    home.mkdir()
    batch = ["train.micro_batch_size=4096", "train.global_batch_size=4096"]
    batch += [f"train.memory_history={str(history).lower()}"]
    words = arguments(byte_dataset, tmp_path / "run", *LARGE, *batch, "train.device=cuda", "train.dtype=bf16")
    done = execute([sys.executable, PRETRAIN, *words], home, timeout=60, CUDA_VISIBLE_DEVICES=VISIBLE)
    assert done.code == 2
    assert len(done.sentences) == 1, done.err
    assert "no memory is left on rank 0" in done.sentences[0]
    path = tmp_path / "run" / "memory" / "rank_00000.pickle"
    assert done.sentences[0].endswith(f"; its memory is in {path}")
    snapshot = pickle.loads(path.read_bytes())
    assert sum(segment["allocated_size"] for segment in snapshot["segments"]) > 0
    (recorded, *_) = snapshot["device_traces"]
    assert any(event["action"] == "oom" for event in recorded) == history
    assert any("llama.py" in frame["filename"] for event in recorded for frame in event.get("frames", ())) == history


@pytest.mark.parametrize("where", ["none", "cpu"])
def test_a_run_with_deterministic_kernels_is_continued_to_the_bit(
    where: str, byte_dataset: str, tmp_path: Path
) -> None:
    more = ["train.device=cuda", "train.dtype=bf16", "train.deterministic=true", "train.steps=8", "checkpoint.every=4"]
    more.append(f"zero.offload_optimizer={where}")
    train(byte_dataset, tmp_path / "whole", tmp_path / "a", *more)
    train(byte_dataset, tmp_path / "parts", tmp_path / "b", *more, "train.stop_after=4")
    train(byte_dataset, tmp_path / "parts", tmp_path / "c", *more)
    whole, parts = (read_tensors(tmp_path / name / "checkpoints" / "step_00000008") for name in ("whole", "parts"))
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
