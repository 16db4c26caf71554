"""A copy of a run small enough for any layout of a few processes on this machine, with the same structure. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megallama.config.schema import ModelConfig, RunConfig
from megallama.layout.frozen import frozen_weights

GLOBAL_BATCH_SIZE = 8
LAYERS = 2
SEQUENCE_LENGTH = 32
HEAD_SIZE = 8


def shrink_model(model: ModelConfig, layers: int) -> ModelConfig:
    """`layers` layers of 8 heads; ratio of query to key heads, tying, rotary scaling and initialisation are kept."""
    heads = 8
    kv_heads = max(1, heads * model.kv_heads // model.num_attention_heads)
    while heads % kv_heads:
        kv_heads -= 1
    apart = model.head_size * model.num_attention_heads != model.hidden_size
    return model.model_copy(
        update={
            "hidden_size": heads * HEAD_SIZE,
            "intermediate_size": 160,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 2 * HEAD_SIZE if apart else None,
            "max_position_embeddings": SEQUENCE_LENGTH,
        }
    )


def shrink_frozen(model: ModelConfig, patterns: Sequence[str], layers: int) -> list[str]:
    """The names of what is frozen in a model of `layers` layers, as far as it can be what `patterns` freeze in `model`.

    Each kind of layer, by what is frozen in it, is there, in the order of the model, or the first kinds if there are
    more than layers.
    """
    frozen = frozen_weights(model, patterns)
    inside: dict[int, set[str]] = {layer: set() for layer in range(model.num_hidden_layers)}
    for name in frozen:
        if name.startswith("model.layers."):
            number, place = name.removeprefix("model.layers.").split(".", 1)
            inside[int(number)].add(place)
    kinds = list(dict.fromkeys(frozenset(places) for places in inside.values()))[:layers]
    found = [name for name in frozen if not name.startswith("model.layers.")]
    for layer in range(layers):
        found += [f"model.layers.{layer}.{place}" for place in kinds[layer * len(kinds) // layers]]
    return sorted(found)


def shrink(
    config: RunConfig,
    folder: Path,
    dataset: Path,
    steps: int,
    dtype: str,
    layers: int = LAYERS,
    global_batch_size: int = GLOBAL_BATCH_SIZE,
) -> RunConfig:
    """The whole run, in `folder`, on `dataset` (bytes as tokens), saving after every step.

    A ramp is there in small: the second half of the steps has twice the batch.
    """
    first = {"global_batch_size": global_batch_size, "until": -(-steps // 2) * global_batch_size * SEQUENCE_LENGTH}
    ramp = [first] if config.train.batch_ramp else []
    masked = config.train.objective == "masked"
    return RunConfig.model_validate(
        {
            "run": {"dir": str(folder)},
            "model": shrink_model(config.model, layers).model_dump() | {"vocab_size": 258 if masked else 257},
            "data": {
                "path": str(dataset),
                "sequence_length": SEQUENCE_LENGTH,
                "validation_fraction": 0.1,
                # Unequal counts of labels in micro-batches tell a mean over tokens from a mean of means.
                "eod_mask_loss": True,
                "document_mask": config.data.document_mask,
            },
            "zero": {"bucket_elements": 10_000, "communication_dtype": config.zero.communication_dtype},
            "train": {
                "steps": steps,
                "global_batch_size": 2 * global_batch_size if ramp else global_batch_size,
                "batch_ramp": ramp,
                # torch sums an embedding's gradient over a micro-batch in bf16 on a CPU: 72 sequences lose 2.5 % of it.
                "micro_batch_size": GLOBAL_BATCH_SIZE,
                "seed": config.train.seed,
                "objective": config.train.objective,
                "mask_probability": config.train.mask_probability,
                "freeze": shrink_frozen(config.model, config.train.freeze, layers),
                "dtype": dtype,
                "matmul": "dtype" if dtype == "fp32" or config.train.matmul == "dtype" else "fp8_emulated",
                "device": "cpu",
            },
            # A rate at which a few steps go somewhere, and a clip that every step meets.
            "optimizer": config.optimizer.model_dump() | {"lr": 1e-3, "clip": 0.5},
            "schedule": {"kind": "constant"},
            "health": {"spike_deviations": None},  # layouts that differ must not be told apart by what they skip
            "evaluation": {"samples": global_batch_size},
            "checkpoint": {"every": 1, "keep": steps + 1, "resume": "never"},
        }
    )
