"""Tokens per second of generation beside transformers' `generate`: the same weights, prompts and tokens, in turns.

python benchmarks/generation.py CONFIG [key.sub=value ...] [--prompt N] [--tokens N] [--rows N] [--rounds N] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from megallama.config.load import load_config
from megallama.config.schema import ModelConfig
from megallama.generation.batch import Batch, Row
from megallama.generation.load import Loaded, build
from megallama.generation.sampling import Sampling
from megallama.text.tokenizer import ByteTokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Known(ByteTokenizer):
    """Every id of the vocabulary is a byte: what is timed is the model, and text as well."""

    def __init__(self, size: int) -> None:
        self.vocab_size = size  # type: ignore[misc]


def theirs(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A random Llama of this shape, which ends no text."""
    torch.manual_seed(0)
    described = config.model_dump(include=set(ModelConfig.model_fields) - {"block", "init", "rope_scaling"})
    described |= {"num_key_value_heads": config.kv_heads, "head_dim": config.head_size}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**described, **ids)).to(device, dtype).eval()


def ours(model: LlamaForCausalLM, config: ModelConfig) -> Loaded:
    """The same weights."""
    weights: dict[str, Tensor] = model.state_dict()
    mine = build(config, weights.__getitem__, model.device, model.dtype)
    return Loaded(mine, Known(config.vocab_size), Path("benchmark"), "benchmark")


def write_ours(loaded: Loaded, prompts: Tensor, tokens: int) -> list[list[int]]:
    """What the command does, with its text."""
    batch = Batch(loaded, len(prompts))
    rows = [Row(loaded, prompt, tokens, Sampling(temperature=0.0)) for prompt in prompts.tolist()]
    for row in rows:
        batch.add(row)
    while batch.rows:
        batch.step()
    return [row.ids[row.begin :] for row in rows]


def write_theirs(model: LlamaForCausalLM, prompts: Tensor, tokens: int) -> list[list[int]]:
    """Its own `generate` with its default cache."""
    found = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
    )
    return found[:, prompts.shape[1] :].tolist()


def seconds(write: Callable[[], object], device: torch.device) -> float:
    """The time of one call."""
    began = time.perf_counter()
    write()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Rounds of both, back and forth; medians, and the median of the ratios of a round."""
    config = load_config(options.config, options.overrides).model
    device = torch.device("cuda" if options.device == "cuda" else "cpu")
    model = theirs(config, device, DTYPES[options.dtype])
    loaded = ours(model, config)
    draws = torch.Generator().manual_seed(1)
    prompts = torch.randint(config.vocab_size, (options.rows, options.prompt), generator=draws).to(device)
    contenders: dict[str, Callable[[], list[list[int]]]] = {
        "megallama": lambda: write_ours(loaded, prompts, options.tokens),
        "transformers": lambda: write_theirs(model, prompts, options.tokens),
    }
    first, second = [write() for write in contenders.values()]  # warms up
    same = sum(a == b for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds):
        for name in sorted(contenders, reverse=number % 2 == 1):
            times[name].append(seconds(contenders[name], device))
    written = options.rows * options.tokens
    ratios = [theirs / mine for mine, theirs in zip(times["megallama"], times["transformers"], strict=True)]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "same_tokens": same / written,
        **{f"{name}_tokens_per_second": written / statistics.median(found) for name, found in times.items()},
        "ratio": statistics.median(ratios),
        "least_ratio": min(ratios),
        "most_ratio": max(ratios),
    }


def main() -> None:
    """Print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=192, help="tokens that are written")
    parser.add_argument("--rows", type=int, default=1, help="prompts at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_intermixed_args()
    found = measure(options)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:30} {value:,.3f}")


if __name__ == "__main__":
    main()
