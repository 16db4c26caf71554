"""Cut layers against plain ones in fp64, outputs and gradients, and the whole model without DeepSpeed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import megallama.layout.counts
import megallama.model.tiled_mlp
from megallama.config.schema import IGNORE_INDEX, ModelConfig
from megallama.layout.topology import Topology
from megallama.model.init import initialise
from megallama.model.layers import (
    ColumnParallelLinear,
    GradientFilter,
    RMSNorm,
    RowParallelLinear,
    VocabParallelEmbedding,
)
from megallama.model.llama import Llama, Recompute, TensorParallelContext
from megallama.parallel.cross_entropy import IN_PLACE, SoftmaxKernels, compiled_kernels, linear_cross_entropy
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ALONE, Axis, build_mesh
from megallama.parallel.shards import ShardSlice
from megallama.parallel.spawn import run_ranks
from megallama.train.shares import has_share
from tests.launching import needs_compiler

TOLERANCE = 1e-10


def join(launch: Launch) -> Axis:
    torch.set_default_dtype(torch.float64)
    return build_mesh(Topology(tp=launch.world_size), launch, torch.device("cpu")).tp


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cut(x: Tensor, dim: int, tp: Axis) -> Tensor:
    return x.chunk(tp.size, dim)[tp.rank].clone()


def fill(module: nn.Module, pieces: tuple[ShardSlice, ...], whole: dict[str, Tensor]) -> None:
    weight = module.get_parameter("weight")
    with torch.no_grad():
        weight.zero_()
        for piece in pieces:
            part = tuple(slice(a, a + n) for a, n in zip(piece.offset, piece.size, strict=True))
            piece.of(weight).copy_(whole[piece.name][part])


def assert_pieces_match(weight: Tensor, pieces: tuple[ShardSlice, ...], whole: dict[str, Tensor]) -> None:
    for piece in pieces:
        part = tuple(slice(a, a + n) for a, n in zip(piece.offset, piece.size, strict=True))
        torch.testing.assert_close(piece.of(weight), whole[piece.name][part], rtol=TOLERANCE, atol=TOLERANCE)


def whole_gradient(weight: nn.Parameter) -> Tensor:
    """Of the norms whose gradients ranks have shares of, their sum, which training takes once per step."""
    assert weight.grad is not None
    if has_share(weight):
        torch.distributed.all_reduce(weight.grad)
    return weight.grad


def column_then_row(launch: Launch, sequence_parallel: bool) -> None:
    tp = join(launch)
    x, target = random(8, 2, 12), random(8, 2, 12, seed=9)
    whole = {"a": random(16, 12, seed=1), "b": random(16, 12, seed=2), "down": random(12, 16, seed=3)}
    dense = {name: weight.clone().requires_grad_() for name, weight in whole.items()}
    dense_x = x.clone().requires_grad_()
    dense_out = F.linear(torch.tanh(F.linear(dense_x, dense["a"])) * F.linear(dense_x, dense["b"]), dense["down"])
    (dense_out * target).sum().backward()

    column = ColumnParallelLinear(12, {"a": 16, "b": 16}, tp, sequence_parallel, GradientFilter())
    row = RowParallelLinear("down", 16, 12, tp, sequence_parallel, GradientFilter())
    fill(column, column.pieces(), whole)
    fill(row, row.pieces(), whole)
    seen = (lambda t: cut(t, 0, tp)) if sequence_parallel else (lambda t: t)
    own_x = seen(x).clone().requires_grad_()
    a, b = column(own_x).split(column.widths, dim=-1)
    out = row(torch.tanh(a) * b)
    (out * seen(target)).sum().backward()

    torch.testing.assert_close(out, seen(dense_out), rtol=TOLERANCE, atol=TOLERANCE)
    assert dense_x.grad is not None and own_x.grad is not None
    torch.testing.assert_close(own_x.grad, seen(dense_x.grad), rtol=TOLERANCE, atol=TOLERANCE)
    gradients = {name: weight.grad for name, weight in dense.items() if weight.grad is not None}
    assert column.weight.grad is not None and row.weight.grad is not None
    assert_pieces_match(column.weight.grad, column.pieces(), gradients)
    assert_pieces_match(row.weight.grad, row.pieces(), gradients)


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
def test_column_then_row_matches_dense_outputs_and_gradients(tp: int, sequence_parallel: bool) -> None:
    run_ranks(column_then_row, tp, sequence_parallel)


def embedding_and_norm(launch: Launch, sequence_parallel: bool) -> None:
    tp = join(launch)
    vocabulary = 150  # rank 0 of 2 holds 128 real rows, rank 1 holds 22 and padding
    whole = {"embed": random(vocabulary, 12), "norm": random(12, seed=1)}
    tokens = torch.randint(0, vocabulary, (2, 8), generator=torch.Generator().manual_seed(2))
    target = random(8, 2, 12, seed=3)
    dense = {name: weight.clone().requires_grad_() for name, weight in whole.items()}
    dense_out = F.rms_norm(F.embedding(tokens.t(), dense["embed"]), (12,), dense["norm"], 1e-5)
    (dense_out * target).sum().backward()

    embed = VocabParallelEmbedding("embed", vocabulary, 12, tp, sequence_parallel)
    norm = RMSNorm("norm", 12, 1e-5, share=sequence_parallel)
    fill(embed, embed.pieces(), whole)
    fill(norm, norm.pieces(), whole)
    seen = (lambda t: cut(t, 0, tp)) if sequence_parallel else (lambda t: t)
    out = norm(embed(tokens))
    (out * seen(target)).sum().backward()
    torch.testing.assert_close(out, seen(dense_out), rtol=TOLERANCE, atol=TOLERANCE)
    gradients = {name: weight.grad for name, weight in dense.items() if weight.grad is not None}
    assert embed.weight.grad is not None and norm.weight.grad is not None
    assert_pieces_match(embed.weight.grad, embed.pieces(), gradients)
    assert_pieces_match(whole_gradient(norm.weight), norm.pieces(), gradients)
    assert not embed.weight.grad[embed.real_rows :].any()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_vocabulary_cut_embedding_and_norm_match_dense(sequence_parallel: bool) -> None:
    run_ranks(embedding_and_norm, 2, sequence_parallel)


def cross_entropy(
    launch: Launch,
    vocabulary: int,
    chunk_elements: int,
    z_loss: float,
    frozen: bool,
    compiled: bool = False,
) -> int:
    """Returns the largest number of elements of any 2-D tensor made inside the loss."""
    tp = join(launch)
    megallama.layout.counts.LOGITS_AT_ONCE = 4 * chunk_elements
    hidden, weight = random(24, 12), random(vocabulary, 12, seed=1)
    labels = torch.randint(0, vocabulary, (24,), generator=torch.Generator().manual_seed(2))
    labels[::5] = IGNORE_INDEX
    dense_hidden, dense_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    dense = F.cross_entropy(dense_hidden @ dense_weight.t(), labels, ignore_index=IGNORE_INDEX, reduction="sum")
    squares = torch.logsumexp(dense_hidden @ dense_weight.t(), dim=-1)[labels != IGNORE_INDEX].square()
    ((dense + z_loss * squares.sum()) * 0.3).backward()

    embed = VocabParallelEmbedding("head", vocabulary, 12, tp, False)
    fill(embed, embed.pieces(), {"head": weight})
    embed.requires_grad_(not frozen)
    own_hidden = hidden.clone().requires_grad_()
    with LargestTensor() as largest:
        kernels = compiled_kernels() if compiled else IN_PLACE
        of_rank = embed.first, embed.real_rows, tp
        loss = linear_cross_entropy(own_hidden, embed.weight, labels, *of_rank, z_loss, kernels)
        (loss * 0.3).backward()
    torch.testing.assert_close(loss, dense, rtol=TOLERANCE, atol=TOLERANCE)
    assert own_hidden.grad is not None and dense_hidden.grad is not None and dense_weight.grad is not None
    grad_hidden = own_hidden.grad.clone()
    if tp.size > 1:
        torch.distributed.all_reduce(grad_hidden)
    torch.testing.assert_close(grad_hidden, dense_hidden.grad, rtol=TOLERANCE, atol=TOLERANCE)
    assert (embed.weight.grad is None) == frozen
    if embed.weight.grad is not None:
        assert_pieces_match(embed.weight.grad, embed.pieces(), {"head": dense_weight.grad})
    return largest.elements


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Remembers the most elements of any matrix made that has nothing to do with the hidden size, 12."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dim() == 2 and 12 not in out.shape:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("vocabulary", [256, 300, 100])  # no padding; padding on the last rank; a rank of padding alone
@pytest.mark.parametrize("tp", [1, 2])
def test_vocabulary_cut_cross_entropy_matches_torch_in_chunks(tp: int, vocabulary: int) -> None:
    rows = -(-vocabulary // (128 * tp)) * 128
    for chunk, z_loss, frozen in ((5, 0.2, False), (5, 0.2, True), (24, 0.0, False)):
        largest = max(run_ranks(cross_entropy, tp, vocabulary, chunk * rows, z_loss, frozen))
        # Not the tokens times the vocabulary: a chunk of tokens times this rank's rows.
        assert largest == chunk * rows


@pytest.mark.layouts
@needs_compiler
@pytest.mark.parametrize(("tp", "vocabulary"), [(1, 300), (2, 100)])
def test_compiled_passes_over_logits_find_the_same(tp: int, vocabulary: int) -> None:
    rows = -(-vocabulary // (128 * tp)) * 128
    run_ranks(cross_entropy, tp, vocabulary, 10 * rows, 0.2, False, True)  # five tokens, of 8 bytes a logit


def test_a_gradient_in_bf16_has_the_scale_of_the_loss_and_not_one_rounded_to_bf16() -> None:
    """1.5029 is 1.5 in bf16."""
    draws, norms = torch.Generator().manual_seed(0), []
    hidden, weight = (torch.randn(rows, 64, generator=draws).bfloat16() for rows in (512, 128))
    labels = torch.randint(128, (512,), generator=draws)
    for scale in (1.0, 1.5029):
        given = hidden.clone().requires_grad_()
        (linear_cross_entropy(given, weight, labels, 0, 128, ALONE) * torch.tensor(scale)).backward()
        assert given.grad is not None and given.grad.dtype == torch.bfloat16
        norms.append(float(given.grad.double().norm()))
    assert norms[1] / norms[0] == pytest.approx(1.5029, rel=3e-4)


@pytest.mark.parametrize("kernels", [IN_PLACE, pytest.param(None, marks=[needs_compiler, pytest.mark.layouts])])
def test_in_bf16_the_label_of_a_token_that_is_as_good_as_known_keeps_its_gradient(
    kernels: SoftmaxKernels | None,
) -> None:
    """0.9987 is 1.0 in bf16: the gradient -0.0013 must not be a difference from it."""
    logits = torch.zeros(1, 128)
    logits[0, 3] = 11.5
    weight = logits.t().contiguous().bfloat16().requires_grad_()
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    label = torch.tensor([3])
    linear_cross_entropy(hidden, weight, label, 0, 128, ALONE, kernels=kernels or compiled_kernels()).backward()
    assert weight.grad is not None
    exact = torch.softmax(logits[0].double(), 0)[3] - 1
    assert float(weight.grad[3, 0]) == pytest.approx(float(exact), rel=2**-8)


MODELS = {
    "grouped queries": {"num_key_value_heads": 4},
    "fewer kv heads than tp, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "kv heads and tp share no factor, qk_norm": {
        **{"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8},
        "qk_norm": True,
    },
    "llama3 scaling, qk_norm": {
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16},
        "qk_norm": True,
    },
}


def model_against_one_device(
    launch: Launch, shape: dict[str, object], sequence_parallel: bool, recompute: Recompute, tile: int | None
) -> tuple[float, dict[str, float]]:
    """Relative differences from the same model on one device: of the loss, and of each gradient by logical name.

    The logits are asserted to be the same.
    """
    tp = join(launch)
    if tile is not None:
        megallama.model.tiled_mlp.GATES_AT_ONCE = tile * 2 * 96 // tp.size
    base: dict[str, object] = {"vocab_size": 150, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    config = ModelConfig.model_validate(base | {"num_attention_heads": 8} | shape)
    tokens = torch.randint(0, 150, (2, 17), generator=torch.Generator().manual_seed(2))

    def results(model: Llama) -> tuple[Tensor, Tensor, dict[str, tuple[ShardSlice, Tensor]]]:
        held = model.shard_slices
        initialise(model, held, seed=3, num_layers=2, std=0.2)
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 32
        loss.backward()
        grads = {name: whole_gradient(weight) for name, weight in model.named_parameters() if weight.grad is not None}
        with torch.no_grad():
            logits = model(tokens[:, :-1])
        return logits, loss.detach(), {p.name: (p, p.of(grads[name])) for name, each in held.items() for p in each}

    logits, loss, own = results(Llama(config, TensorParallelContext(tp, sequence_parallel), recompute=recompute))
    dense_logits, dense_loss, dense = results(Llama(config))
    torch.testing.assert_close(logits, dense_logits, rtol=TOLERANCE, atol=TOLERANCE)
    # The last ranks hold padding alone of this small vocabulary; the first holds a piece of everything.
    assert launch.rank > 0 or own.keys() == dense.keys()
    apart = {}
    for name, (piece, grad) in own.items():
        part = tuple(slice(a, a + n) for a, n in zip(piece.offset, piece.size, strict=True))
        apart[name] = float((grad - dense[name][1][part]).norm() / dense[name][1].norm())
    return float((loss / dense_loss - 1).abs()), apart


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(
    ("sequence_parallel", "recompute", "tile"),
    [(False, "none", None), (True, "selective", None), (True, "full", None), (True, "offload", 9), (False, "full", 9)],
)
def test_model_at_tp_matches_one_device_in_fp64(
    shape: dict[str, object], sequence_parallel: bool, recompute: Recompute, tile: int | None
) -> None:
    for loss, gradients in run_ranks(model_against_one_device, 4, shape, sequence_parallel, recompute, tile):
        assert loss < TOLERANCE
        assert {name: apart for name, apart in gradients.items() if not apart < TOLERANCE} == {}
