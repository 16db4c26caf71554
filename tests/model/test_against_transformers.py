"""An independent Llama, that of transformers, gives the same logits, loss and gradients from the same weights.

With qk_norm it is Qwen3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from megallama.config.schema import ModelConfig
from megallama.model.attention import heads_first, sequence_first
from megallama.model.init import initialise
from megallama.model.llama import Attention, Llama
from megallama.model.rotary import rotate

SEQUENCE = 48
PLAIN: dict[str, Any] = {
    "vocab_size": 301,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 2 * SEQUENCE,
    "rms_norm_eps": 1e-3,  # large enough that leaving it out would show
}
# Of the wavelengths 6, 20, 63, ... positions the first is kept, the second blended, the rest stretched.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "theta_500000": {"rope_theta": 500_000.0},
    "llama3_rope": {"rope_scaling": LLAMA3},
    "linear_rope": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "grouped_query": {"num_key_value_heads": 2},
    "multi_query": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head_dim_apart": {"head_dim": 32, "num_key_value_heads": 2},
    "qwen3": {"qk_norm": True, "head_dim": 32, "num_key_value_heads": 2, "rope_theta": 500_000.0},
    "llama_3_2": {
        "rope_theta": 500_000.0,
        "rope_scaling": LLAMA3,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True)
class Outcome:
    """What a model makes of one batch; gradients under Hugging Face's names."""

    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_loss_and_every_gradient_equal_those_of_transformers(variant: str) -> None:
    ours, reference = both(ModelConfig(**(PLAIN | VARIANTS[variant])))
    assert_same(ours, reference)


def test_the_comparison_sees_channels_paired_in_the_other_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta's own weights pair neighbouring channels; with Hugging Face's weights that order is wrong."""

    def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        half = x.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

    monkeypatch.setattr("megallama.model.llama.rotate", rotate_neighbours)
    ours, reference = both(ModelConfig(**PLAIN))
    assert (ours.logits - reference.logits).abs().max() > 1e-2
    assert abs(ours.loss - reference.loss) > 1e-4 * reference.loss
    with pytest.raises(AssertionError):
        assert_same(ours, reference)


def test_the_comparison_sees_queries_and_keys_normalised_after_the_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Attention, x: Tensor, cos: Tensor, sin: Tensor, core: None) -> Tensor:
        projected = self.qkv_proj(x).split(self.qkv_proj.widths, dim=-1)
        q, k, v = (heads_first(self._split_heads(each)) for each in projected)
        q, k = self.q_norm(rotate(q, cos, sin)), self.k_norm(rotate(k, cos, sin))
        return self.o_proj(sequence_first(self.core(q, k, v)).flatten(2))

    monkeypatch.setattr(Attention, "forward", forward)
    with pytest.raises(AssertionError):
        assert_same(*both(ModelConfig(**(PLAIN | VARIANTS["qwen3"]))))


@pytest.mark.parametrize("variant", ["theta_500000", "llama3_rope", "linear_rope"])
def test_the_comparison_sees_rotary_settings_left_out(variant: str) -> None:
    ours, reference = both(ModelConfig(**PLAIN), ModelConfig(**(PLAIN | VARIANTS[variant])))
    with pytest.raises(AssertionError):
        assert_same(ours, reference)


def assert_same(ours: Outcome, reference: Outcome) -> None:
    """Logits within 1e-4, the loss within 1e-5 relative, each gradient within |dg| / |g| of 1e-5."""
    torch.testing.assert_close(ours.logits, reference.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(ours.loss, reference.loss, rtol=1e-5, atol=0)
    assert ours.gradients.keys() == reference.gradients.keys()
    apart = {
        name: float((ours.gradients[name] - gradient).norm() / gradient.norm())
        for name, gradient in reference.gradients.items()
    }
    assert {name: value for name, value in apart.items() if not value <= 1e-5} == {}


def both(config: ModelConfig, told: ModelConfig | None = None) -> tuple[Outcome, Outcome]:
    """Outcomes of our model and of transformers' on the same weights and tokens; `told` is what the latter is told."""
    tokens = torch.randint(config.vocab_size, (2, SEQUENCE + 1), generator=torch.Generator().manual_seed(1))
    ours = random_llama(config)
    reference = transformers_llama(told or config)
    copy_weights(ours, reference)
    return outcome_of_ours(ours, tokens), outcome_of_transformers(reference, tokens)


def random_llama(config: ModelConfig) -> Llama:
    """Weights large enough to matter, and norms that are not all ones, so that no two could be swapped unseen."""
    model = Llama(config)
    initialise(model, model.shard_slices, seed=7, num_layers=config.num_hidden_layers, std=0.1)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=draws))
    return model


def transformers_llama(config: ModelConfig) -> nn.Module:
    """The same shape in transformers, with its plain attention: no kernel in common with ours."""
    shape = config.model_dump(exclude={"init", "rope_theta", "rope_scaling", "qk_norm"})
    shape |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        rope |= config.rope_scaling.model_dump()
    if config.qk_norm:
        return Qwen3ForCausalLM(Qwen3Config(**shape, rope_parameters=rope, attn_implementation="eager"))
    return LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope, attn_implementation="eager"))


@torch.no_grad()
def copy_weights(ours: Llama, reference: nn.Module) -> None:
    """Every parameter of `reference` from the piece of ours that bears its name."""
    parameters = dict(reference.named_parameters())
    for name, pieces in ours.shard_slices.items():
        for piece in pieces:
            parameters.pop(piece.name).copy_(piece.of(ours.get_parameter(name)))
    assert not parameters, f"without a counterpart: {sorted(parameters)}"


def outcome_of_ours(model: Llama, tokens: Tensor) -> Outcome:
    """Ours takes labels already shifted and returns their sum."""
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    with torch.no_grad():
        logits = model(inputs)
    loss = model(inputs, labels) / labels.numel()
    loss.backward()
    gradients: dict[str, Tensor] = {}
    for name, pieces in model.shard_slices.items():
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradients |= {piece.name: piece.of(gradient) for piece in pieces}
    return Outcome(logits, loss.detach(), gradients)


def outcome_of_transformers(model: nn.Module, tokens: Tensor) -> Outcome:
    """transformers shifts the labels itself and returns their mean."""
    output = model(tokens, labels=tokens)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Outcome(output.logits[:, :-1].detach(), output.loss.detach(), gradients)
