"""transformers as the judge: it loads what was trained here, and what it wrote goes on here as it would there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.utility import SafetensorsLocal
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel, Qwen3ForCausalLM

from megallama.checkpoint.state import DataIdentity
from megallama.checkpoint.writing.beginning import write_beginning
from megallama.config.load import load_config
from megallama.config.schema import ModelConfig
from megallama.data.loader import open_data
from megallama.exchange.incoming import import_folder
from megallama.exchange.outgoing import export
from megallama.layout.counts import count_parameters, weight_shapes
from megallama.layout.topology import Topology
from megallama.text.tokenizer import load_tokenizer
from tests.exchange.foreign import LLAMA3, VARIANTS, meta_logits, our_llama, random_llama, save, write_meta_folder
from tests.launching import ROOT, arguments, clean_environment, events, pretrain

pytestmark = pytest.mark.peers

TP2_PP2 = ["parallel.tensor=2", "parallel.pipeline=2"]
V = "parallel.schedule=zbvzerobubble"
TRAINED = {
    "plain": ["model.num_key_value_heads=4"],
    "grouped": ["model.num_key_value_heads=2"],
    "llama3": [f"model.rope_scaling={json.dumps(LLAMA3)}", "model.rope_theta=500000"],
    "linear": ["model.rope_scaling={rope_type: linear, factor: 4}", "model.rope_theta=20000"],
    "tied": ["model.tie_word_embeddings=true", V],
    "padded": ["model.vocab_size=1001", "model.head_dim=16"],
    "qwen3": ["model.qk_norm=true", "model.num_key_value_heads=2", "optimizer.z_loss=1e-3"],
}


def trained(dataset: str, run: Path, *more: str) -> Path:
    """The last checkpoint of ten steps at tp 2 x pp 2."""
    learning = ["train.steps=10", "optimizer.lr=1e-2", "model.max_position_embeddings=128", "evaluation.every=0"]
    words = arguments(dataset, run, *learning, "model.num_hidden_layers=4", *TP2_PP2)
    assert pretrain(4, [*words, "train.micro_batch_size=1", *more]) == [(0, "")] * 4
    return run / "checkpoints" / "step_00000010"


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: Tensor, tokens: int) -> list[int]:
    ids = prompt
    for _ in range(tokens):
        logits = model(ids)
        ids = torch.cat([ids, getattr(logits, "logits", logits)[:, -1:].argmax(-1)], dim=1)
    return ids[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("variant", TRAINED)
@torch.no_grad()
def test_transformers_gives_the_logits_and_the_text_of_what_was_trained(
    byte_dataset: str, tmp_path: Path, variant: str
) -> None:
    path, out = trained(byte_dataset, tmp_path / "run", *TRAINED[variant]), tmp_path / "out"
    export(tmp_path / "run", out, "hf", "fp32")
    theirs, ours = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval(), our_llama(path)
    assert isinstance(theirs, Qwen3ForCausalLM if variant == "qwen3" else LlamaForCausalLM)
    assert theirs.dtype == torch.float32
    tokenizer, library = load_tokenizer("bytes"), AutoTokenizer.from_pretrained(out)
    text = "document 7 is about 49 \u00e9\u4e2d\n\n   "
    assert library(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
    tokens = torch.randint(0, 257, [3, 128], generator=torch.Generator().manual_seed(1))
    expected = ours(tokens)
    assert expected.shape[-1] == theirs.config.vocab_size
    assert (theirs(tokens).logits - expected).abs().max() < 1e-4
    prompt = torch.tensor([tokenizer.encode("document ")])
    theirs.generation_config.eos_token_id = None
    written = theirs.generate(prompt, do_sample=False, max_new_tokens=64, pad_token_id=0)
    assert written[0, prompt.shape[1] :].tolist() == greedy(ours, prompt, 64)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_an_import_has_the_logits_and_its_export_is_the_original(tmp_path: Path, variant: str, dtype: str) -> None:
    model = random_llama(variant).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    source = save(model, tmp_path / "model", max_shard_size="100KB")
    assert len(list(source.glob("*.safetensors"))) > 3
    import_folder(source, tmp_path / "run", ["data.tokenizer=bytes"], None, None)
    tokens = torch.randint(0, 300, [2, 128], generator=torch.Generator().manual_seed(1))
    ours = our_llama(tmp_path / "run" / "checkpoints" / "step_00000000")
    theirs = type(model).from_pretrained(source, dtype=torch.float32, attn_implementation="eager").eval()
    assert (ours(tokens) - theirs(tokens).logits).abs().max() < 1e-4
    export(tmp_path / "run", tmp_path / "out", "hf", dtype)
    before, after = (_tensors(folder) for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def _tensors(folder: Path) -> dict[str, Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


@pytest.mark.parametrize("files", [1, 2, 4])
@torch.no_grad()
def test_metas_files_have_the_logits_of_a_forward_in_metas_form(tmp_path: Path, files: int) -> None:
    model = random_llama()
    folder = write_meta_folder(model, tmp_path / "meta", files)
    import_folder(folder, tmp_path / "run", ["data.tokenizer=bytes"], None, None)
    params = json.loads((folder / "params.json").read_text())
    whole = write_meta_folder(model, tmp_path / "whole", 1)
    state = torch.load(whole / "consolidated.00.pth", weights_only=True)
    tokens = torch.randint(0, 300, [2, 128], generator=torch.Generator().manual_seed(1))
    ours = our_llama(tmp_path / "run" / "checkpoints" / "step_00000000")
    assert (ours(tokens) - meta_logits(state, params, tokens)).abs().max() < 1e-4


@pytest.mark.parametrize("variant", ["grouped", "llama3", "tied", "qwen3"])
def test_training_goes_on_with_the_losses_of_a_loop_of_transformers(
    byte_dataset: str, tmp_path: Path, variant: str
) -> None:
    model = random_llama(variant, initializer_range=0.05)
    source, out, run = save(model, tmp_path / "model"), tmp_path / "imported", tmp_path / "run"
    import_folder(source, out, ["data.tokenizer=bytes"], None, None)
    words = [
        *("--config", str(out / "config.yaml"), f"run.dir={run}", f"data.path={byte_dataset}"),
        *("data.sequence_length=32", "train.dtype=fp32", "train.device=cpu", "train.global_batch_size=4"),
        *("train.steps=3", "optimizer.lr=1e-3", "optimizer.weight_decay=0", "schedule.kind=constant", V),
    ]
    assert pretrain(4, [*words, *TP2_PP2]) == [(0, "")] * 4
    found = [event["loss"] for event in events(run, "train")]
    config = load_config(words[1], words[2:])
    assert found == pytest.approx(_transformers_losses(model, config), rel=1e-5)


def _transformers_losses(model: PreTrainedModel, config: Any) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    loader, losses = open_data(config, Topology(), 0).train, []
    for step in range(3):
        batches = list(loader.step(4 * step))
        tokens, labels = torch.cat([b.tokens for b in batches]), torch.cat([b.labels for b in batches])
        logits = model(tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("architecture", "words", "weights"),
    [(gguf.MODEL_ARCH.LLAMA, [], 4 * 9 + 3), (gguf.MODEL_ARCH.QWEN3, ["model.qk_norm=true"], 4 * 11 + 3)],
)
def test_the_reader_of_llama_cpp_finds_every_tensor_by_a_name_that_it_knows(
    byte_dataset: str, tmp_path: Path, architecture: gguf.MODEL_ARCH, words: list[str], weights: int
) -> None:
    """Its parser of safetensors and its table of names; its converter script is not in the package."""
    trained(byte_dataset, tmp_path / "run", *words)
    export(tmp_path / "run", tmp_path / "out", "hf", "bf16")
    names = gguf.get_tensor_name_map(architecture, 4)
    (path,) = (tmp_path / "out").glob("*.safetensors")
    expected, found = _tensors(tmp_path / "out"), SafetensorsLocal(path).tensors
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        read = torch.frombuffer(bytearray(found[name].mmap_bytes().tobytes()), dtype=torch.bfloat16)
        assert (found[name].dtype, found[name].shape) == ("BF16", tuple(tensor.shape))
        assert torch.equal(read.view(tensor.shape), tensor), name
    mapped = {name: names.get_name(name, try_suffixes=(".weight",)) for name in found}
    assert None not in mapped.values()
    assert len(set(mapped.values())) == weights


ONE_BILLION = ModelConfig(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    tie_word_embeddings=True,
)
MEASURED = """
import re, sys
from pathlib import Path
from megallama.exchange.outgoing import export
export(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], "bf16")
print(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.timeout(900)
def test_a_billion_parameters_are_exported_within_one_and_a_half_gigabytes(tmp_path: Path) -> None:
    """Llama 3.2 1B, whose largest tensor has 1.05 GB in fp32."""
    assert count_parameters(ONE_BILLION).total > 1.2e9
    shapes = weight_shapes(ONE_BILLION)
    path = write_beginning(
        tmp_path / "checkpoints", ONE_BILLION, DataIdentity("-", 1), lambda n: torch.full(shapes[n], 0.01).numpy()
    )
    command = [sys.executable, "-c", MEASURED, str(path), str(tmp_path / "out"), "hf"]
    done = subprocess.run(
        command, cwd=ROOT, env=clean_environment(tmp_path), capture_output=True, text=True, check=True, timeout=800
    )
    peak = int(done.stdout) * 1024
    for folder in ("checkpoints", "out"):
        shutil.rmtree(tmp_path / folder)  # gigabytes, which pytest would keep
    print(f"peak {peak / 1e9:.2f} GB")
    assert peak < 1.5e9
