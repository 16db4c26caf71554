"""Peers that ask for other versions of what megallama needs: they lie in a folder of their own, past the environment.

`make bench` fills it by benchmarks/peers.sh.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from megallama.config.schema import RunConfig
from megallama.data.indexed import open_indexed
from megallama.model.llama import Llama

FOLDER = Path(__file__).parents[2] / ".venv" / "peers"


def found() -> None:
    """Let imports find the peers; what the environment has comes first."""
    if str(FOLDER) not in sys.path:
        sys.path.append(str(FOLDER))


def litgpt_llama(ours: Llama, config: RunConfig) -> Any:
    """litgpt's GPT as a Llama, with the weights of `ours`."""
    found()
    from litgpt.config import Config
    from litgpt.model import GPT

    shape = config.model
    model = GPT(
        Config(
            block_size=config.data.sequence_length,
            n_layer=shape.num_hidden_layers,
            n_embd=shape.hidden_size,
            n_head=shape.num_attention_heads,
            n_query_groups=shape.kv_heads,
            head_size=shape.head_size,
            intermediate_size=shape.intermediate_size,
            vocab_size=shape.vocab_size,
            padded_vocab_size=shape.vocab_size,
            rotary_percentage=1.0,
            rope_base=int(shape.rope_theta),
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_eps=shape.rms_norm_eps,
            mlp_class_name="LLaMAMLP",
        )
    )
    with torch.no_grad():
        parts = litgpt_parts(model)
        for name, pieces in ours.shard_slices.items():
            for piece in pieces:
                parts[piece.name].copy_(piece.of(ours.get_parameter(name)))
    if config.train.dtype == "bf16":  # as its bf16-true has them
        model.cos, model.sin = model.cos.bfloat16(), model.sin.bfloat16()
    if config.train.compile:
        model.compile()
    return model


def litgpt_parts(model: Any) -> dict[str, Tensor]:
    """Its weights, by the names of Hugging Face."""
    found = {
        "model.embed_tokens.weight": model.transformer.wte.weight,
        "model.norm.weight": model.transformer.ln_f.weight,
        "lm_head.weight": model.lm_head.weight,
    }
    for index, block in enumerate(model.transformer.h):
        query, key = block.attn.proj.in_features, model.config.n_query_groups * model.config.head_size
        q, k, v = block.attn.qkv.weight.split([query, key, key])
        found |= {
            f"model.layers.{index}.{name}.weight": weight
            for name, weight in {
                "input_layernorm": block.norm_1.weight,
                "self_attn.q_proj": q,
                "self_attn.k_proj": k,
                "self_attn.v_proj": v,
                "self_attn.o_proj": block.attn.proj.weight,
                "post_attention_layernorm": block.norm_2.weight,
                "mlp.gate_proj": block.mlp.fc_1.weight,
                "mlp.up_proj": block.mlp.fc_2.weight,
                "mlp.down_proj": block.mlp.proj.weight,
            }.items()
        }
    return found


def litgpt_loss(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Its own loss in chunks of 128, which is a mean, times what it is the mean of.

    Of fp32 logits, as the others take it: of bf16 ones it would be rounded to three digits.
    """
    from litgpt.utils import chunked_cross_entropy

    def summed(tokens: Tensor, labels: Tensor) -> Tensor:
        loss: Tensor = chunked_cross_entropy(model(tokens).float(), labels) * labels.numel()
        return loss

    return summed


def litdata_rows(prefix: Path, folder: Path, length: int) -> Callable[[], Iterator[NDArray[Any]]]:
    """Copies the documents of a dataset into litdata's format; what opens the copy, for shuffled rows of `length`."""
    found()
    from litdata.streaming import Cache, StreamingDataset, TokensLoader

    documents, written = open_indexed(str(prefix)), Cache(str(folder), chunk_bytes="64MB", item_loader=TokensLoader())
    for number in range(documents.num_documents):
        written[number] = documents.document(number)
    written.done()
    written.merge()
    return lambda: iter(StreamingDataset(str(folder), item_loader=TokensLoader(length), shuffle=True))
