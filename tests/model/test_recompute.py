"""Recomputation keeps fewer bytes for backward and changes no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from megallama.config.schema import ModelConfig
from megallama.model.init import initialise
from megallama.model.layers import GradientFilter
from megallama.model.llama import Llama, Recompute
from megallama.model.offload import OffloadedInputs, _Arriving, _Input
from megallama.model.tiled_mlp import tiled_mlp
from megallama.parallel.mesh import ALONE

SHAPE = ModelConfig(vocab_size=301, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4)
MODES: tuple[Recompute, ...] = ("none", "selective", "full", "offload")


def bytes_kept_for_backward(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `forward` returns, and the bytes that autograd keeps of it beside the parameters, held anyway."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        # Operations that keep the same tensor, or views of one, share its memory.
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()
    return result, sum(storage.nbytes() for place, storage in kept.items() if place not in parameters)


def model(recompute: Recompute) -> Llama:
    made = Llama(SHAPE, recompute=recompute)
    initialise(made, made.shard_slices, seed=7, num_layers=SHAPE.num_hidden_layers, std=0.1)
    return made


def tokens(length: int = 33) -> Tensor:
    return torch.randint(SHAPE.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))


def saved_bytes_and_gradients(recompute: Recompute) -> tuple[int, dict[str, Tensor]]:
    made, given = model(recompute), tokens()
    loss, kept = bytes_kept_for_backward(made, lambda: made(given[:, :-1], given[:, 1:]))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == dict(made.named_parameters()).keys()
    return kept, gradients


def test_each_kind_of_recomputation_keeps_less_than_the_one_before() -> None:
    none, selective, full = (saved_bytes_and_gradients(mode)[0] for mode in MODES[:3])
    positions, width = 2 * 32, SHAPE.intermediate_size
    # silu(gate) and its product with up, in fp32.
    assert none - selective == SHAPE.num_hidden_layers * 2 * positions * width * 4
    # Of a layer its input alone is left; the loss keeps the same in all three.
    assert full < selective / 2


def test_recomputation_changes_no_bit_of_any_gradient() -> None:
    _, plain = saved_bytes_and_gradients("none")
    for mode in MODES[1:]:
        _, gradients = saved_bytes_and_gradients(mode)
        assert [name for name, gradient in plain.items() if not torch.equal(gradients[name], gradient)] == []


class Away(OffloadedInputs):
    """The path of a GPU on a CPU: an input leaves as a copy, and each time a new one comes back."""

    moved: ClassVar[list[tuple[str, int]]] = []
    present: ClassVar[list[StorageWeakRef]] = []
    most = 0

    def _out(self, tensor: Tensor) -> Tensor:
        self.moved.append(("out", len(self._inputs)))
        return tensor.clone()

    def _back(self, packed: _Input) -> _Arriving:
        self.moved.append(("back", packed.index))
        tensor = packed.held.clone()
        self.present.append(StorageWeakRef(tensor.untyped_storage()))
        Away.most = max(Away.most, sum(not each.expired() for each in self.present))
        return _Arriving(packed.index, tensor, None)


def test_offload_brings_each_input_back_once_and_one_layer_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megallama.model.llama.OffloadedInputs", Away)
    _, plain = saved_bytes_and_gradients("none")
    Away.moved.clear()
    kept, gradients = saved_bytes_and_gradients("offload")
    assert [name for name, gradient in plain.items() if not torch.equal(gradients[name], gradient)] == []
    assert Away.moved == [("out", i) for i in range(3)] + [("back", i) for i in (2, 1, 0)]
    assert Away.most == 2
    state, seen_by_its_hooks = 2 * 32 * SHAPE.hidden_size * 4, 2 * 32 * SHAPE.head_size * 4  # cos and sin
    assert saved_bytes_and_gradients("full")[0] - kept == SHAPE.num_hidden_layers * state + seen_by_its_hooks


def test_inputs_come_back_ahead_whichever_way_backward_goes() -> None:
    """As it does in the two parts of a split backward, or where it turns back with another input on its way."""
    moved, x = Away.moved, [torch.randn(2, 3, 4, requires_grad=True) for _ in range(3)]
    inputs, layers = Away(x[0].device, None), []
    for each in x:
        with inputs.of(each):
            layers.append(each.sin())
    moved.clear()
    for index in (2, 1, 0, 0, 1, 2, 1, 2):
        (gradient,) = torch.autograd.grad(layers[index].sum(), x[index], retain_graph=True)
        torch.testing.assert_close(gradient, x[index].detach().cos())
        moved.append(("read", index))
    there = [("back", 2), ("back", 1), ("read", 2), ("back", 0), ("read", 1), ("read", 0)]
    again = [("back", 0), ("read", 0), ("back", 1), ("back", 2), ("read", 1), ("read", 2)]
    turned = [("back", 1), ("back", 0), ("read", 1), ("back", 2), ("read", 2)]
    assert moved == there + again + turned


class Work(TorchDispatchMode):
    """The most tokens of which a matmul makes gate and up at once, and FLOPs of all matmuls."""

    tokens, flops = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            if isinstance(result, Tensor) and result.shape[-1] == 2 * SHAPE.intermediate_size:
                self.tokens = max(self.tokens, result.shape[:-1].numel())
            self.flops += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


def looked_at(recompute: Recompute, length: int) -> tuple[Work, dict[str, Tensor]]:
    made, given = model(recompute).double(), tokens(length + 1)
    with Work() as work:
        made(given[:, :-1], given[:, 1:]).backward()
    return work, {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("recompute", ["full", "offload"])
def test_an_mlp_in_tiles_is_the_mlp(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    """As much is computed as by recomputation of all tokens at once."""
    at_once, plain = looked_at(recompute, 240)
    monkeypatch.setattr("megallama.model.tiled_mlp.GATES_AT_ONCE", 50 * 2 * SHAPE.intermediate_size)
    tiled, gradients = looked_at(recompute, 240)
    assert (at_once.tokens, tiled.tokens) == (2 * 240, 50)
    assert tiled.flops == at_once.flops
    for name, gradient in plain.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-9, atol=1e-9)


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def test_the_parts_of_a_split_backward_get_what_a_whole_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megallama.model.tiled_mlp.GATES_AT_ONCE", 5 * 24)
    draw = torch.Generator().manual_seed(3)
    x, gate_up, down = (
        torch.randn(*shape, generator=draw, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 9, 8), (24, 8), (8, 12))
    )
    part, direction = GradientFilter(), torch.randn(2, 9, 8, generator=draw, dtype=torch.float64)
    result = tiled_mlp(x, gate_up, down, ALONE, part)
    with part.only("inputs"):
        of_input = torch.autograd.grad(result, x, direction, retain_graph=True)
    with part.only("weights"):
        of_weights = torch.autograd.grad(result, (gate_up, down), direction)
    whole = torch.autograd.grad(swiglu(x, gate_up, down), (x, gate_up, down), direction)
    torch.testing.assert_close((*of_input, *of_weights), whole)


def test_bf16_gradients_of_many_tiles_are_rounded_as_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms of one sign: a sum in bf16 stops to grow at 512 of them."""
    monkeypatch.setattr("megallama.model.tiled_mlp.GATES_AT_ONCE", 8)
    draw = torch.Generator().manual_seed(3)
    x, *weights = (torch.rand(*shape, generator=draw).bfloat16() for shape in ((1, 2048, 4), (8, 4), (4, 4)))
    x, *weights = (each.requires_grad_() for each in (x, *weights))
    exact = [each.detach().float().requires_grad_() for each in weights]
    gradients = torch.autograd.grad(tiled_mlp(x, *weights, ALONE, GradientFilter()).sum(), weights)
    for gradient, expected in zip(gradients, torch.autograd.grad(swiglu(x.float(), *exact).sum(), exact), strict=True):
        torch.testing.assert_close(gradient.float(), expected, rtol=2**-7, atol=0)
