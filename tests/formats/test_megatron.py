"""Checkpoints in megatron-core's layout, written by torch alone: what is read, and what is refused in one sentence."""

from __future__ import annotations

import json
import os
import pickle
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

from megallama.config.schema import ModelConfig
from megallama.errors import UserError
from megallama.formats.megatron import Megatron
from megallama.formats.weights import check_shapes, llama_shapes

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # when torch writes the source
State = dict[str, Any]
CONFIG = ModelConfig(
    vocab_size=13,
    hidden_size=8,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
)
TOLD = {"num_attention_heads": 4, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
ARGS = {
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "norm_epsilon": 1e-6,
    "rotary_base": 500,
    "untie_embeddings_and_output_weights": True,
}
Q_NORM, K_NORM = "self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"
QKV, FC1 = "self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"


def hugging_face() -> dict[str, Tensor]:
    """Weights under their logical names."""
    draws = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=draws) for name, shape in llama_shapes(CONFIG).items()}


def megatron(*, local: bool = False, stacked: bool = True) -> State:
    """The same as megatron-core keeps them, with the names of its own or transformer-engine's layers."""
    own, layers = hugging_face(), []
    norms = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
    if not local:
        norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
    for number in range(CONFIG.num_hidden_layers):
        layer = {name.split(".", 3)[3]: own[name] for name in own if name.startswith(f"model.layers.{number}.")}
        q, k, v = (layer[f"self_attn.{part}_proj.weight"].view(2, -1, 6, 8) for part in "qkv")
        layers.append(
            {
                norms[0]: layer["input_layernorm.weight"],
                QKV: torch.cat([q, k, v], dim=1).view(-1, 8),
                "self_attention.linear_proj.weight": layer["self_attn.o_proj.weight"],
                norms[1]: layer["post_attention_layernorm.weight"],
                FC1: torch.cat([layer["mlp.gate_proj.weight"], layer["mlp.up_proj.weight"]]),
                "mlp.linear_fc2.weight": layer["mlp.down_proj.weight"],
            }
        )
    state = {f"decoder.layers.{name}": torch.stack([layer[name] for layer in layers]) for name in layers[0]}
    if not stacked:
        state = {f"decoder.layers.{i}.{name}": layer[name] for i, layer in enumerate(layers) for name in layer}
    state["decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2"] = "no tensor"
    return {
        "embedding.word_embeddings.weight": torch.cat([own["model.embed_tokens.weight"], torch.full((3, 8), 7.0)]),
        **state,
        "decoder.final_layernorm.weight": own["model.norm.weight"],
        "output_layer.weight": torch.cat([own["lm_head.weight"], torch.full((3, 8), 7.0)]),
    }


def save(folder: Path, state: State, args: dict[str, Any] | None = None) -> Path:
    """A run of one checkpoint."""
    found = folder / "iter_0000020"
    dcp.save(state, storage_writer=dcp.FileSystemWriter(found), no_dist=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("20")
    (found / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    torch.save({"iteration": 20} | ({} if args is None else {"args": Namespace(**args)}), found / "common.pt")
    return found


def assert_reads(folder: Path, told: dict[str, Any], dtype: torch.dtype = torch.float32) -> None:
    weights = Megatron(folder, {"vocab_size": 13, **told})
    check_shapes(weights, ModelConfig(**weights.model), str(folder))
    for name, tensor in hugging_face().items():
        torch.testing.assert_close(weights.read(name), tensor.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("stacked", [False, True])
def test_weights_are_read_whatever_their_names_and_layers(tmp_path: Path, local: bool, stacked: bool) -> None:
    found = save(tmp_path, megatron(local=local, stacked=stacked))
    assert_reads(tmp_path, TOLD)
    assert_reads(found, TOLD)


@pytest.mark.parametrize(
    ("args", "told"), [(None, TOLD), ({**ARGS, "qk_layernorm": True}, {})], ids=["of tensors", "of arguments"]
)
def test_norms_of_queries_and_keys_are_read(tmp_path: Path, args: dict[str, Any] | None, told: dict[str, Any]) -> None:
    norms = {"q_norm": torch.randn(2, 6), "k_norm": torch.randn(2, 6)}
    theirs = {f"decoder.layers.{Q_NORM}": norms["q_norm"], f"decoder.layers.{K_NORM}": norms["k_norm"]}
    save(tmp_path, {**megatron(), **theirs}, args)
    weights = Megatron(tmp_path, told)
    config = ModelConfig(**weights.model)
    assert config.qk_norm
    check_shapes(weights, config, "")
    for name, layers in norms.items():
        for number, expected in enumerate(layers):
            assert torch.equal(weights.read(f"model.layers.{number}.self_attn.{name}.weight"), expected)
    save(tmp_path / "denied", {**megatron(), **theirs}, {**ARGS, "qk_layernorm": False})
    with pytest.raises(UserError, match=r"q_layernorm.weight, which is not of a Llama of its description"):
        Megatron(tmp_path / "denied")


def test_a_prefix_of_every_name_is_left_out(tmp_path: Path) -> None:
    save(tmp_path, {f"module.{name}": tensor for name, tensor in megatron().items()})
    assert_reads(tmp_path, TOLD)


@pytest.mark.parametrize("key", ["fp32_param", "param"])
def test_masters_are_read_in_the_place_of_weights(tmp_path: Path, key: str) -> None:
    whole = megatron()
    rounded = {name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in whole.items()}
    masters = {f"optimizer.state.{key}.{name}": whole[name] for name in whole if "_extra" not in name}
    moments = {f"optimizer.state.exp_avg.{name}": whole[name] for name in whole if "_extra" not in name}
    save(tmp_path / "with", {**rounded, **masters, **moments})
    assert_reads(tmp_path / "with", TOLD)
    flat = {"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.param": torch.zeros(40)}
    save(tmp_path / "without", {**rounded, **flat})
    assert_reads(tmp_path / "without", TOLD, torch.bfloat16)


def test_the_shape_comes_from_the_arguments_of_megatron_lm(tmp_path: Path) -> None:
    save(tmp_path, megatron(), {**ARGS, "use_rope_scaling": True, "rope_scaling_factor": 32.0})
    model = ModelConfig(**Megatron(tmp_path).model)
    expected = CONFIG.model_dump() | {
        "vocab_size": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }
    assert model.model_dump() == expected


def test_a_read_takes_only_the_parts_that_hold_some_of_it(tmp_path: Path) -> None:
    found = save(tmp_path, megatron(stacked=False))
    weights = Megatron(tmp_path, TOLD)
    (file,) = found.glob("*.distcp")
    places = pickle.loads((found / ".metadata").read_bytes()).storage_data
    second = next(place for index, place in places.items() if index.fqn == f"decoder.layers.1.{QKV}")
    content = bytearray(file.read_bytes())
    content[second.offset : second.offset + second.length] = bytes(second.length)
    file.write_bytes(content)
    weights.read("model.layers.0.self_attn.q_proj.weight")
    with pytest.raises(UserError, match=r"decoder\.layers\.1\..*damaged.*copy the checkpoint again"):
        weights.read("model.layers.1.self_attn.q_proj.weight")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({f"decoder.layers.{FC1[:-6]}bias": torch.zeros(2, 24)}, "mlp.linear_fc1.bias, which no Llama has"),
        ({"decoder.layers.mlp.router.weight": torch.zeros(2, 4)}, "mlp.router.weight, which no Llama has"),
        ({f"decoder.layers.{Q_NORM[:-6]}bias": torch.zeros(2, 6)}, "q_layernorm.bias, which no Llama has"),
        ({f"decoder.layers.{Q_NORM}": torch.zeros(2, 6)}, "has no decoder.layers.0.self_attention.k_layernorm.weight"),
        ({f"decoder.layers.{K_NORM}": torch.zeros(2, 6)}, "k_layernorm.weight, which is not of a Llama"),
        ({"embedding.position_embeddings.weight": torch.zeros(4, 8)}, "position_embeddings.weight, which no Llama has"),
        ({f"decoder.layers.{FC1}": torch.zeros(2, 12, 8)}, r"linear_fc1.weight in the shape \[2, 12, 8\]"),
        ({f"decoder.layers.{QKV}": torch.zeros(2, 47, 8)}, "has 47 rows in .*linear_qkv.weight"),
        ({"decoder.final_layernorm.weight": torch.zeros(9)}, r"final_layernorm.weight in the shape \[9\]"),
        ({"decoder.final_layernorm.weight": None}, "has no decoder.final_layernorm.weight"),
        ({f"decoder.layers.{QKV}": None}, "has no decoder.layers.0.self_attention.linear_qkv.weight"),
        ({"embedding.word_embeddings.weight": None}, "has no embedding.word_embeddings.weight"),
        (
            {"decoder.layers.7.mlp.linear_fc2.weight": torch.zeros(8, 12)},
            "layers.7.mlp.linear_fc2.weight, which is not",
        ),
        ({f"decoder.layers.{QKV}": torch.zeros(2, 48, 8, dtype=torch.uint8)}, "in torch.uint8; expected float32"),
    ],
)
def test_what_no_llama_has_is_named(tmp_path: Path, changed: State, said: str) -> None:
    save(tmp_path, {name: value for name, value in {**megatron(), **changed}.items() if value is not None})
    with pytest.raises(UserError, match=said):
        Megatron(tmp_path, TOLD)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rotary_interleaved": True}, "rotary_interleaved=true.*expected rotary_interleaved=false"),
        ({"rotary_percent": 0.5}, "rotary_percent=0.5"),
        ({"normalization": "LayerNorm"}, "normalization=LayerNorm"),
        ({"qk_l2_norm": True}, "qk_l2_norm=true"),
        ({"qk_layernorm": True}, "has no decoder.layers.0.self_attention.q_layernorm.weight"),
        ({"apply_layernorm_1p": True}, "apply_layernorm_1p=true"),
        ({"swiglu": False}, "swiglu=false"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type=learned_absolute"),
        ({"use_rope_scaling": True, "rotary_seq_len_interpolation_factor": 2}, "has both use_rope_scaling"),
        ({"norm_epsilon": "small"}, "norm_epsilon=small; expected a number"),
        ({"num_attention_heads": 5}, "num_attention_heads=5; give a model.num_attention_heads that divides"),
        ({"num_attention_heads": 3}, "are not queries, keys and values of num_attention_heads=3"),
        ({"untie_embeddings_and_output_weights": False}, "output_layer.weight, which is not of a Llama"),
    ],
)
def test_arguments_of_another_model_are_refused(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    save(tmp_path, megatron(), {**ARGS, **changed})
    with pytest.raises(UserError, match=said):
        Megatron(tmp_path)


def test_what_tensors_do_not_tell_is_asked_for(tmp_path: Path) -> None:
    save(tmp_path, megatron())
    with pytest.raises(UserError, match=re.escape("give model.num_attention_heads=... model.rope_theta=...")):
        Megatron(tmp_path, {"max_position_embeddings": 64, "rms_norm_eps": 1e-5})
    with pytest.raises(UserError, match=r"word_embeddings.weight in the shape \[16, 8\]"):
        Megatron(tmp_path, {**TOLD, "vocab_size": 17})


class Code:
    """A pickle of it runs a command."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.made}",)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    found = save(tmp_path, megatron())
    described = (found / ".metadata").read_bytes()
    (found / ".metadata").write_bytes(pickle.dumps(Code(made)))
    with pytest.raises(UserError, match=r"holds posix.system, which describes no tensor, and is not loaded"):
        Megatron(tmp_path, TOLD)
    (found / ".metadata").write_bytes(described)
    torch.save({"args": Namespace(**ARGS, hidden=Code(made))}, found / "common.pt")
    with pytest.raises(UserError, match=r"common.pt holds posix.system, which is no plain value, and is not loaded"):
        Megatron(tmp_path, TOLD)
    torch.save({"args": Code(made)}, found / "common.pt", pickle_protocol=4)  # whose names no one sees before it runs
    with pytest.raises(UserError, match=r"common.pt is no whole file of plain values by torch.save"):
        Megatron(tmp_path, TOLD)
    torch.save({}, found / "common.pt")
    code = found / "code.distcp"
    torch.save(Code(made), code)
    metadata = pickle.loads(described)
    for place in metadata.storage_data.values():
        place.relative_path, place.offset, place.length = code.name, 0, code.stat().st_size
    (found / ".metadata").write_bytes(pickle.dumps(metadata))
    weights = Megatron(tmp_path, TOLD)
    with pytest.raises(UserError, match=r"holds decoder.final_layernorm.weight in a file that is damaged .Weights on"):
        weights.read("model.norm.weight")
    assert not made.exists()
    torch.load(code, weights_only=False)
    assert made.exists()


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    found = save(tmp_path, megatron())
    (file,) = found.glob("*.distcp")
    described, content = (found / ".metadata").read_bytes(), file.read_bytes()
    file.write_bytes(content[:-3000])
    refused(tmp_path, r"\.distcp ends before a part of .*copy the checkpoint again")
    file.unlink()
    refused(tmp_path, r"\.distcp, which holds .*, cannot be read \(No such file or directory\)")
    file.write_bytes(content)
    (found / ".metadata").write_bytes(described[:-40])
    refused(tmp_path, r"\.metadata is damaged")

    def change(how: Callable[[Any], object]) -> None:
        metadata = pickle.loads(described)
        how(metadata)
        (found / ".metadata").write_bytes(pickle.dumps(metadata))

    change(lambda metadata: metadata.state_dict_metadata["output_layer.weight"].chunks.clear())
    refused(tmp_path, r"does not list all of output_layer\.weight")
    change(lambda metadata: metadata.storage_data.clear())
    refused(tmp_path, r"does not say where \S+ is")
    change(lambda metadata: [setattr(each, "relative_path", "../other") for each in metadata.storage_data.values()])
    refused(tmp_path, r"names the file \.\./other, which is not in its folder")
    change(lambda metadata: setattr(metadata, "storage_data", 3))
    refused(tmp_path, "does not describe tensors")


def test_parts_that_overlap_are_no_whole_tensor(tmp_path: Path) -> None:
    norm, half = "decoder.final_layernorm.weight", "optimizer.half"
    found = save(tmp_path, {**megatron(), half: torch.zeros(4)})
    metadata = pickle.loads((found / ".metadata").read_bytes())
    metadata.state_dict_metadata[norm].chunks = 2 * metadata.state_dict_metadata[half].chunks
    at = {index.fqn: index for index in metadata.storage_data}
    metadata.storage_data[at[norm]] = metadata.storage_data[at[half]]
    (found / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(UserError, match=r"does not list all of decoder.final_layernorm.weight; copy the checkpoint"):
        Megatron(tmp_path, TOLD).read("model.norm.weight")


def test_records_of_an_older_torch_are_read(tmp_path: Path) -> None:
    found = save(tmp_path, megatron())
    metadata = pickle.loads((found / ".metadata").read_bytes())
    for tensor in metadata.state_dict_metadata.values():
        if hasattr(tensor, "properties"):
            tensor.properties = TensorProperties(dtype=tensor.properties.dtype)
    (found / ".metadata").write_bytes(pickle.dumps(metadata))
    assert_reads(tmp_path, TOLD)


def test_another_format_is_told_from_a_damaged_one(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", r"has no \.metadata; give a run of Megatron")
    found = save(tmp_path, megatron())
    (found / "common.pt").write_bytes(b"none")
    refused(tmp_path, r"common.pt is no whole file of plain values")
    (found / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    refused(tmp_path, "sharded_backend=zarr; expected torch_dist")
    (found / "mp_rank_00").mkdir()
    refused(tmp_path, "is a checkpoint of one file a rank; save it with Megatron's --ckpt-format torch_dist")


def refused(folder: Path, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Megatron(folder, TOLD)
