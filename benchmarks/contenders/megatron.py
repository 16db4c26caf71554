"""megatron-core on a CPU, from its wheel as it is: its GPTModel as a Llama on tensor-parallel ranks, its GPTDataset."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from megallama.config.schema import RunConfig
from megallama.data.loader import MicroBatch


class OnCpu(TorchFunctionMode):
    """What megatron-core asks of CUDA by name, on the CPU: nothing else in it needs a GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return args[0] if func is torch.Tensor.cuda else func(*args, **kwargs)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Inside, megatron-core finds a CPU where it looks for its GPU."""
    here: Any = torch.cuda
    before, here.current_device = here.current_device, lambda: torch.device("cpu")
    try:
        with OnCpu():
            yield
    finally:
        here.current_device = before


def gpt_model(config: RunConfig, sequence: bool, weights: dict[str, Tensor]) -> nn.Module:
    """With this rank's part of `weights`, which have the names of Hugging Face."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import initialize_rng_tracker
    from megatron.core.transformer import TransformerConfig

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
        initialize_rng_tracker(inference_rng_tracker=True)  # the one that needs no CUDA; there is no dropout
    shape = config.model
    settings = TransformerConfig(
        num_layers=shape.num_hidden_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.intermediate_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_size,
        tensor_model_parallel_size=dist.get_world_size(),
        sequence_parallel=sequence,
        normalization="RMSNorm",
        layernorm_epsilon=shape.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        persist_layer_norm=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
    )
    with on_cpu():
        model = GPTModel(
            settings,
            get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=shape.vocab_size,
            max_sequence_length=config.data.sequence_length,
            position_embedding_type="rope",
            rotary_base=int(shape.rope_theta),
            share_embeddings_and_output_weights=False,
        )
    fill(model, weights, config)
    return model


@torch.no_grad()
def fill(model: Any, weights: dict[str, Tensor], config: RunConfig) -> None:
    """Its queries, keys and values lie group by group, its gate and up one above the other on each rank."""
    rank, size, shape = dist.get_rank(), dist.get_world_size(), config.model

    def mine(weight: Tensor, dim: int = 0) -> Tensor:
        return weight.chunk(size, dim)[rank]

    model.embedding.word_embeddings.weight.copy_(mine(weights["model.embed_tokens.weight"]))
    model.decoder.final_layernorm.weight.copy_(weights["model.norm.weight"])
    model.output_layer.weight.copy_(mine(weights["lm_head.weight"]))
    for index, layer in enumerate(model.decoder.layers):
        of = {name: weights[f"model.layers.{index}.{name}.weight"] for name in LAYER}
        groups = [of[f"self_attn.{name}_proj"].unflatten(0, (shape.kv_heads, -1)) for name in "qkv"]
        layer.self_attention.linear_qkv.weight.copy_(mine(torch.cat(groups, 1)).flatten(0, 1))
        layer.self_attention.linear_proj.weight.copy_(mine(of["self_attn.o_proj"], 1))
        layer.mlp.linear_fc1.weight.copy_(torch.cat([mine(of["mlp.gate_proj"]), mine(of["mlp.up_proj"])]))
        layer.mlp.linear_fc2.weight.copy_(mine(of["mlp.down_proj"], 1))
        layer.input_layernorm.weight.copy_(of["input_layernorm"])
        layer.pre_mlp_layernorm.weight.copy_(of["post_attention_layernorm"])


LAYER = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    *("input_layernorm", "post_attention_layernorm"),
)


def mean_loss(model: Any, batch: MicroBatch) -> Tensor:
    """Of a micro-batch, forward and backward."""
    length = batch.tokens.shape[1]
    positions = torch.arange(length).expand_as(batch.tokens)
    future = torch.ones(length, length).triu(1).bool()[None, None]
    with on_cpu():
        loss: Tensor = model(batch.tokens, positions, future, labels=batch.labels).mean()
        loss.backward()
    return loss.detach()


@torch.no_grad()
def clip(model: Any, most: float) -> None:
    """By the norm over all ranks, weights that each of them has counted once."""
    parts = [torch.zeros(()), torch.zeros(())]
    for parameter in model.parameters():
        parts[bool(getattr(parameter, "tensor_model_parallel", False))] += parameter.grad.square().sum()
    dist.all_reduce(parts[1])
    scale = most / (parts[0] + parts[1]).sqrt().clamp(min=most)
    for parameter in model.parameters():
        parameter.grad *= scale


def gpt_dataset(prefix: Path, cache: str, length: int, vocabulary: int, end: int) -> Any:
    """An epoch of all documents in shuffled samples of `length`, without attention masks; its indices go to `cache`."""
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=cache,
        tokenizer=SimpleNamespace(vocab_size=vocabulary, eod=end, unique_identifiers={}),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [None] * 3, lambda: True, config).build()[0]
