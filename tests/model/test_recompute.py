"""Recomputation keeps fewer bytes for backward and changes no gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megallama.config.schema import ModelConfig
from megallama.model.init import initialise
from megallama.model.llama import Llama, Recompute

SHAPE = ModelConfig(vocab_size=301, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4)
MODES: tuple[Recompute, ...] = ("none", "selective", "full")


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


def saved_bytes_and_gradients(recompute: Recompute) -> tuple[int, dict[str, Tensor]]:
    model = Llama(SHAPE, recompute=recompute)
    initialise(model, model.shard_slices, seed=7, num_layers=SHAPE.num_hidden_layers, std=0.1)
    tokens = torch.randint(SHAPE.vocab_size, (2, 33), generator=torch.Generator().manual_seed(1))
    loss, kept = bytes_kept_for_backward(model, lambda: model(tokens[:, :-1], tokens[:, 1:]))
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    return kept, gradients


def test_each_kind_of_recomputation_keeps_less_than_the_one_before() -> None:
    none, selective, full = (saved_bytes_and_gradients(mode)[0] for mode in MODES)
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
