"""Names and shapes of the weights of a Llama: those of Hugging Face's LlamaForCausalLM. Pure."""

from __future__ import annotations

from megallama.config.schema import ModelConfig

Shape = tuple[int, ...]


def weight_shapes(model: ModelConfig) -> dict[str, Shape]:
    """Every weight as one device would hold it, the vocabulary unpadded; a tied head is no weight of its own."""
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (model.vocab_size, model.hidden_size)}
    for layer in range(model.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in _layer_shapes(model).items()}
    shapes["model.norm.weight"] = (model.hidden_size,)
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, model.hidden_size)
    return shapes


def _layer_shapes(model: ModelConfig) -> dict[str, Shape]:
    hidden, width = model.hidden_size, model.intermediate_size
    query_width, kv_width = model.num_attention_heads * model.head_size, model.kv_heads * model.head_size
    return {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query_width, hidden),
        "self_attn.k_proj": (kv_width, hidden),
        "self_attn.v_proj": (kv_width, hidden),
        "self_attn.o_proj": (hidden, query_width),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (width, hidden),
        "mlp.up_proj": (width, hidden),
        "mlp.down_proj": (hidden, width),
    }
