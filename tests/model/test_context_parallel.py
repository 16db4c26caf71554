"""A sequence that ranks share against a whole one in fp64: attention and its gradients, the work, what is sent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from megallama.config.schema import ModelConfig
from megallama.layout.topology import Topology, context_slices
from megallama.model.attention import ExchangedAttention, FusedAttention, by_rank, in_order
from megallama.model.init import initialise
from megallama.model.llama import Llama, Recompute, TensorParallelContext
from megallama.parallel.issued import Issued
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import Axis, build_mesh
from megallama.parallel.spawn import run_ranks

LENGTH, HEADS, KV_HEADS, WIDTH = 48, 8, 4, 16
DOCUMENTS = torch.tensor([[0] * 7 + [1] + [2] * 40, [0] * 48, [0] * 30 + [1] * 17 + [2]], dtype=torch.int32)
KINDS = (FusedAttention, ExchangedAttention)
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
SHAPE = ModelConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def held(x: Tensor, dim: int, cp: Axis) -> Tensor:
    return torch.cat([x.narrow(dim, s.start, s.stop - s.start) for s in context_slices(LENGTH, cp.rank, cp.size)], dim)


def attend(attention: FusedAttention, tensors: list[Tensor], target: Tensor, *, apart: bool) -> list[Tensor]:
    """The output, and the gradients of queries, keys and values."""
    tensors = [each.clone().requires_grad_() for each in tensors]
    out = (attention.within(DOCUMENTS, WIDTH) if apart else attention)(*tensors)
    return [out.detach(), *torch.autograd.grad((out * target).sum(), tensors)]


def as_a_whole(launch: Launch) -> None:
    cp = build_mesh(Topology(cp=launch.world_size), launch, torch.device("cpu")).axes["cp"]
    shapes = ((3, HEADS, LENGTH, WIDTH), *[(3, KV_HEADS, LENGTH, WIDTH)] * 2)
    whole = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    target = random(*shapes[0], seed=9)
    for causal in (True, False):
        for apart in (True, False):
            expected = attend(FusedAttention(causal), whole, target, apart=apart)
            for kind in KINDS:
                parts = [held(each, 2, cp) for each in whole]
                found = attend(kind(causal, cp), parts, held(target, 2, cp), apart=apart)
                for mine, all_of_it in zip(found, expected, strict=True):
                    torch.testing.assert_close(mine, held(all_of_it, 2, cp), rtol=1e-10, atol=1e-10)
    assert torch.equal(
        FusedAttention(True, cp).places(LENGTH // cp.size, whole[0].device), held(torch.arange(LENGTH), 0, cp)
    )


@pytest.mark.parametrize("cp", [2, 4])
def test_attention_and_its_gradients_are_those_of_a_whole_sequence(cp: int) -> None:
    run_ranks(as_a_whole, cp)


def graphs_of_a_layer(launch: Launch) -> list[int]:
    """How many graphs torch's compiler makes of a decoder layer, by recomputation."""
    cp, found = build_mesh(Topology(cp=launch.world_size), launch, torch.device("cpu")).axes["cp"], []
    for recompute in RECOMPUTE:
        made = Llama(SHAPE, TensorParallelContext(attention=ExchangedAttention(True, cp)), recompute=recompute)
        initialise(made, made.shard_slices, seed=0, num_layers=1, scheme="llama", std=0.02)
        torch._dynamo.reset()
        counters.clear()
        for layer in made.layers.values():
            layer.compile(backend="aot_eager")
        tokens = torch.zeros(1, LENGTH // cp.size, dtype=torch.long)
        made(tokens, tokens).backward()
        found.append(counters["stats"]["unique_graphs"])
    return found


def test_a_layer_that_exchanges_heads_is_one_graph() -> None:
    assert run_ranks(graphs_of_a_layer, 2) == [[1, 1, 1]] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_slices_cover_the_sequence_and_are_put_in_order(size: int) -> None:
    length = 12 * size
    parts = [torch.cat([torch.arange(length)[s] for s in context_slices(length, rank, size)]) for rank in range(size)]
    side_by_side = torch.cat(parts)[None]
    assert in_order(side_by_side, 1, size).flatten().tolist() == list(range(length))
    assert torch.equal(by_rank(in_order(side_by_side, 1, size), 1, size), side_by_side)


@pytest.mark.parametrize("size", [2, 4, 16])
def test_all_ranks_work_as_much(size: int) -> None:
    """Pairs of a position and one that it sees, of causal attention over a sequence of one document."""
    length = 64 * size
    document = torch.zeros(1, length, dtype=torch.int32)
    work = []
    for rank in range(size):
        stretches = FusedAttention(True, Axis(None, rank, size)).stretches(document)
        work.append(sum(n * (keys.stop - keys.start) - n * (n - 1) // 2 for n, keys in stretches))
    assert sum(work) == length * (length + 1) // 2
    assert max(work) == min(work)


def issued(launch: Launch) -> list[dict[str, tuple[int, int]]]:
    """Of the attention of one layer, forward and backward: number of collectives and bytes, by kind and mode."""
    cp = build_mesh(Topology(cp=launch.world_size), launch, torch.device("cpu")).axes["cp"]
    found = []
    for kind in KINDS:
        own = LENGTH // cp.size
        q, k, v = (random(2, heads, own, WIDTH, seed=0).requires_grad_() for heads in (HEADS, KV_HEADS, KV_HEADS))
        with Issued() as counted:
            out = kind(True, cp)(q, k, v)
            out.backward(torch.ones_like(out))
        found.append({name: (counted.number[name], counted.size[name]) for name in counted.number})
    return found


def test_what_a_layer_sends_is_what_the_documents_say() -> None:
    """gather: keys and values of the whole sequence, once there and once back; ulysses: own q, k, v and output."""
    gathered, exchanged = run_ranks(issued, 2)[0]
    kv, q = 2 * 2 * KV_HEADS * LENGTH * WIDTH * 8, 2 * HEADS * (LENGTH // 2) * WIDTH * 8
    assert gathered == {"all_gather": (1, kv), "reduce_scatter": (1, kv)}
    assert exchanged == {"all_to_all": (6, 2 * (2 * q + kv // 2))}
