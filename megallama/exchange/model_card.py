"""The page that goes with an exported model: what the checkpoint says of it, for its author to complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megallama.config.schema import ModelConfig
from megallama.layout.counts import count_parameters


def model_card(
    name: str, path: Path, document: dict[str, Any], model: ModelConfig, dtype: str, form: str, *, average: bool = False
) -> str:
    """README.md of the export of the run `name`: of its checkpoint at `path`, whose state.json holds `document`.

    Losses that it knows are those of the weights, not of their `average`.
    """
    state, data, layout = document["state"], document["data"], document["layout"]
    length = data.get("sequence_length")
    facts = {
        **({"weights": _average(document["average"])} if average else {}),
        "parameters": f"{count_parameters(model).total:,}",
        "layers": model.num_hidden_layers,
        "hidden size": model.hidden_size,
        "attention heads": f"{model.num_attention_heads}, {model.kv_heads} for keys and values",
        "vocabulary": f"{model.vocab_size:,}",
        "longest sequence": f"{model.max_position_embeddings:,}",
        "steps": f"{state['step']:,}",
        "tokens": f"{state['samples'] * length:,}" if length else "not known",
        "training loss": _loss(document["loss"]),
        "validation loss": _loss(state["validation_loss"]),
        "data": f"`{data['fingerprint']}`, seed {data['seed']}",
        "layout": ", ".join(f"{key} {value}" for key, value in layout.items()),
        "type of these files": dtype,
    }
    rows = "\n".join(f"| {fact} | {value} |" for fact, value in facts.items())
    tag, what = ("qwen3", "Llama with norms of queries and keys") if model.qk_norm else ("llama", "Llama")
    head = f"---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [{tag}, megallama]\n---\n\n"
    return (
        f"{head if form == 'hf' else ''}# {name}\n\n"
        f"A {what}, exported by megallama from `{path.name}`.\n\n| | |\n| --- | --- |\n{rows}\n\n"
        "## Training data\n\nTo be written.\n\n## Intended use and limits\n\nTo be written.\n"
    )


def _average(what: dict[str, Any]) -> str:
    steps = what.get("steps")
    kind = f"the mean of those after steps {', '.join(map(str, steps))}" if steps else f"their {what['kind']} average"
    return f"{kind}; the losses below are those of the last weights"


def _loss(value: float | None) -> str:
    return "not known" if value is None else f"{value:.4f}"
