"""Hidden states lie in memory as collectives and matmuls read them: none is copied for its layout at any batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import megallama.model.attention
import megallama.model.layers
from megallama.config.schema import ModelConfig
from megallama.layout.topology import Topology
from megallama.model.layers import RowParallelLinear
from megallama.model.llama import Llama, Recompute, TensorParallelContext
from megallama.parallel.collectives import all_gather
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import Axis, build_mesh
from megallama.parallel.spawn import run_ranks

BATCH, LENGTH = 3, 32
# Of no two tensors the last dims are the same.
SHAPE = ModelConfig(
    **{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 144, "num_hidden_layers": 2},
    **{"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16},
)


class Copies(TorchDispatchMode):
    """The shapes of copies of what has the last dim `width`; gloo's own, of what it scatters, are no part of them."""

    def __init__(self, width: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.width, self.shapes = width, list[tuple[int, ...]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        copied = func in (torch.ops.aten.clone.default, torch.ops.aten.cat.default)
        if copied and result.dim() > 1 and result.shape[-1] == self.width:
            self.shapes.append(tuple(result.shape))
        return result


def rows_apart(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, in_blocks: bool) -> Tensor:
    """Attention of which each row has its own piece of memory."""
    found = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return found.transpose(1, 2).contiguous().transpose(1, 2)


def gathered_row_by_row(x: Tensor, dim: int, axis: Axis) -> Tensor:
    return all_gather(x.transpose(0, 1), 1, axis).transpose(0, 1)


def look(launch: Launch, recompute: Recompute, rows_first: bool) -> tuple[list[tuple[int, ...]], bool]:
    """Copies of hidden states in a forward and a backward; whether output projections read what is in one piece."""
    tp = build_mesh(Topology(tp=launch.world_size), launch, torch.device("cpu")).tp
    if rows_first:
        megallama.model.attention._attend, megallama.model.layers.all_gather = rows_apart, gathered_row_by_row
    model, in_one_piece = Llama(SHAPE, TensorParallelContext(tp, sequence_parallel=True), recompute=recompute), []
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        if isinstance(module, RowParallelLinear):
            module.register_forward_pre_hook(lambda _, given: in_one_piece.append(given[0].is_contiguous()))
    tokens = torch.randint(256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with Copies(SHAPE.hidden_size) as seen:
        model(tokens, tokens).backward()
    return seen.shapes, all(in_one_piece)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_no_hidden_state_is_copied_above_batch_one(recompute: Recompute) -> None:
    assert run_ranks(look, 2, recompute, False) == [([], True)] * 2


def test_the_count_sees_copies() -> None:
    for shapes, in_one_piece in run_ranks(look, 2, "none", True):
        assert shapes and not in_one_piece


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_stage_takes_and_gives_the_sequence_first(sequence_parallel: bool) -> None:
    context = TensorParallelContext(sequence_parallel=sequence_parallel)
    model = Llama(SHAPE, context)
    first, last = Llama(SHAPE, context, layers=[0]), Llama(SHAPE, context, layers=[1])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    weights = model.state_dict()
    for part in (first, last):
        part.load_state_dict({name: weights[name] for name in part.state_dict()})
    tokens = torch.randint(256, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    hidden: Tensor = first(tokens)
    assert hidden.shape == (LENGTH, BATCH, SHAPE.hidden_size) and hidden.is_contiguous()
    assert torch.equal(last(hidden), model(tokens))
    assert model(tokens).shape == (BATCH, LENGTH, 256)
