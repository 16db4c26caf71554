"""Text from a trained run, in one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megallama.checkpoint.format import complete_checkpoints
from megallama.checkpoint.health import healthy_checkpoints
from megallama.checkpoint.reading.store import load_weights
from megallama.checkpoint.state import check_causal, read_saved
from megallama.data.tokenizer import Tokenizer, load_tokenizer
from megallama.errors import UserError
from megallama.model.llama import Llama


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Draw among this many likeliest tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability (arXiv 1904.09751)."""
    seed: int = 0
    """Fixes the draws."""


def load_run(run_dir: Path) -> tuple[Llama, Tokenizer, Path]:
    """The model of a run's newest healthy checkpoint, its tokenizer, and that checkpoint. UserError without one."""
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{run_dir} is not a run directory: it has no config.yaml")
    folder = run_dir / "checkpoints"
    found = healthy_checkpoints(folder) or complete_checkpoints(folder)
    if not found:
        raise UserError(f"{run_dir} holds no checkpoint yet; train until the first save")
    weights = load_weights(found[0])  # first: it reads the files against their hashes
    saved = read_saved(found[0])
    check_causal(found[0], saved)
    model = Llama(saved.model)
    with torch.no_grad():
        for name, pieces in model.shard_slices.items():
            parameter = model.get_parameter(name).zero_()
            for piece in pieces:
                piece.of(parameter).copy_(weights[piece.name])
    return model.eval(), load_tokenizer(str(run_dir / "tokenizer")), found[0]


@torch.no_grad()
def generate(model: Llama, tokenizer: Tokenizer, prompt: str, max_tokens: int, sampling: Sampling) -> str:
    """The prompt and what follows it, until the end of a document or `max_tokens` new tokens.

    The model sees at most its longest sequence, so older tokens drop out of sight.
    """
    ids = tokenizer.encode(prompt) or [tokenizer.eod_id]  # a document begins after the end of another
    begin = len(ids)
    randomness = torch.Generator().manual_seed(sampling.seed)
    for _ in range(max_tokens):
        seen = torch.tensor([ids[-model.config.max_position_embeddings :]])
        following = pick(model(seen)[0, -1].float(), sampling, randomness)
        if following == tokenizer.eod_id:
            break
        ids.append(following)
    return prompt + tokenizer.decode(ids[begin:])


def pick(logits: Tensor, sampling: Sampling, randomness: torch.Generator) -> int:
    """The next token for logits [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    # The likeliest at zero: no temperature is so small that the division overflows for it.
    values, order = ((logits - logits.max()) / sampling.temperature).softmax(dim=-1).sort(descending=True)
    keep = torch.ones_like(values, dtype=torch.bool)
    if sampling.top_k is not None:
        keep[sampling.top_k :] = False
    if sampling.top_p is not None:
        # A token stays if those before it do not reach top_p yet.
        keep &= values.cumsum(dim=-1) - values < sampling.top_p
        keep[0] = True
    return int(order[torch.multinomial(values * keep, 1, generator=randomness)])
