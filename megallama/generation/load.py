"""A model to write with: from a run, a checkpoint or a Hugging Face folder, whole or this rank's shards of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer as Library
from torch import Tensor

from megallama.checkpoint.commands.listing import checkpoint_at
from megallama.checkpoint.reading.inspect import inspect, promised
from megallama.checkpoint.state import check_causal, name_of_weight, read_saved
from megallama.config.load import parse_json, read_text
from megallama.config.schema import ModelConfig
from megallama.errors import UserError
from megallama.formats.folder import open_weights
from megallama.formats.hugging_face import CONFIG
from megallama.formats.weights import check_shapes, model_config
from megallama.layout.topology import Topology
from megallama.model.init import in_memory
from megallama.model.llama import Llama, TensorParallelContext
from megallama.parallel.launch import Launch
from megallama.parallel.mesh import ALONE, Axis, build_mesh, pick_device
from megallama.text.tokenizer import Tokenizer, load_tokenizer

Read = Callable[[str], Tensor]
"""A tensor by its name in Hugging Face's LlamaForCausalLM: whole, on the CPU."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Loaded:
    """A model that writes, and its tokenizer."""

    model: Llama
    tokenizer: Tokenizer
    source: Path
    """The checkpoint or folder that it is from."""
    name: str
    """What a client calls it by."""
    prefix: tuple[int, ...] = ()
    """Ids that its tokenizer begins every text with."""
    ends: frozenset[int] = field(default_factory=frozenset)
    """Ids that end a text."""

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self.model.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @cached_property
    def unused(self) -> list[int]:
        """Ids below the model's vocabulary that stand for no token: never drawn."""
        beyond = range(self.tokenizer.vocab_size, self.config.vocab_size)
        return [*sorted(self.tokenizer.unused_ids), *beyond]

    def encode(self, prompt: str) -> list[int]:
        """The ids of a prompt; an empty one begins a document, after the end of another."""
        return [*self.prefix, *self.tokenizer.encode(prompt)] or [self.tokenizer.eod_id]


def load_model(
    path: Path, device: torch.device | None = None, dtype: str = "fp32", tp: Axis = ALONE, *, average: bool = False
) -> Loaded:
    """The model of a Hugging Face folder, or of the checkpoint that `path` means by `checkpoint_at`, in `dtype`.

    With `average`, its weights are the average that the checkpoint has of them. Each rank of `tp` reads its shards, one
    tensor at a time. UserError where there is no model, or no average, or it is damaged, or does not go with its
    tokenizer or with tp.
    """
    where = device or torch.device("cpu")
    if (path / CONFIG).is_file():
        if average:
            raise UserError(f"{path} is a Hugging Face folder and has no average of the weights; leave out --average")
        return _from_hugging_face(path, where, DTYPES[dtype], tp)
    return _from_checkpoint(*checkpoint_at(path), where, DTYPES[dtype], tp, average=average)


def _from_checkpoint(
    path: Path, run_dir: Path, device: torch.device, dtype: torch.dtype, tp: Axis, *, average: bool
) -> Loaded:
    if reasons := inspect(path):  # it reads the files against their hashes
        raise UserError(f"the checkpoint {path} is damaged ({'; '.join(reasons)}); use another")
    saved, stored = read_saved(path), promised(path)
    check_causal(path, saved)
    stored_name = name_of_weight(path, saved, average=average)
    model = build(saved.model, lambda name: torch.from_numpy(stored.read(stored_name(name))), device, dtype, tp)
    folder = run_dir / "tokenizer"
    if not folder.is_dir():
        raise UserError(f"{path} is outside of a run, and has no tokenizer there; give RUN, or RUN/checkpoints/STEP")
    tokenizer = load_tokenizer(str(folder))
    _check_ids(tokenizer, model.config, path)
    return Loaded(model, tokenizer, path, run_dir.name, begin_of_text(folder), frozenset([tokenizer.eod_id]))


def _from_hugging_face(path: Path, device: torch.device, dtype: torch.dtype, tp: Axis) -> Loaded:
    weights, tokenizer = open_weights(path, "hf"), load_tokenizer(f"hf:{path}")
    config = model_config(weights.model, str(path))
    check_shapes(weights, config, str(path))
    _check_ids(tokenizer, config, path)
    model = build(config, weights.read, device, dtype, tp)
    ends = frozenset([tokenizer.eod_id, *_published_ends(path)])
    return Loaded(model, tokenizer, path, path.absolute().name, begin_of_text(path), ends)


def _check_ids(tokenizer: Tokenizer, config: ModelConfig, source: Path) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} ids and the model a vocabulary of "
            f"{config.vocab_size}; give the model the tokenizer that it was trained with"
        )


def begin_of_text(folder: Path) -> tuple[int, ...]:
    """What the tokenizer.json of a folder, if it holds one, puts before every text: the begin-of-text of a Llama."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return ()
    library = Library.from_file(str(file))
    library.no_padding()
    library.no_truncation()
    alone, framed = library.encode("a", add_special_tokens=False).ids, library.encode("a").ids
    begins = [place for place in range(len(framed)) if framed[place : place + len(alone)] == alone]
    return tuple(framed[: begins[0]]) if begins else ()


def _published_ends(folder: Path) -> list[int]:
    """What ends a text by the generation_config.json of a folder, if it holds one: an id, or several."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return []
    content = parse_json(read_text(file), str(file))
    ends = content.get("eos_token_id") if isinstance(content, dict) else None
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]


def build(config: ModelConfig, read: Read, device: torch.device, dtype: torch.dtype, tp: Axis = ALONE) -> Llama:
    """The model of this shape with the weights that `read` gives, or this rank's shards of it; ready to write.

    UserError where tp does not cut it evenly.
    """
    _check_tp(config, tp.size)
    with torch.device("meta"):
        model = Llama(config, TensorParallelContext(tp))
    for parameter in in_memory(model, dtype, device):
        parameter.requires_grad_(False)
    for name, pieces in model.shard_slices.items():
        parameter = model.get_parameter(name)
        for piece in pieces:
            box = tuple(slice(begin, begin + extent) for begin, extent in zip(piece.offset, piece.size, strict=True))
            piece.of(parameter).copy_(read(piece.name)[box])
    model.frequencies = model.frequencies.to(device)
    if device.type == "cpu":
        _arrange_for_vectors(model)
    return model.eval()


def _arrange_for_vectors(model: Llama) -> None:
    """Lay wide weights out by columns: their product with one vector, as a token needs it, takes half the time."""
    for parameter in model.parameters():
        if parameter.dim() == 2 and parameter.shape[0] >= parameter.shape[1]:
            parameter.data = parameter.data.t().contiguous().t()


def _check_tp(config: ModelConfig, tp: int) -> None:
    cut = {
        "num_attention_heads": config.num_attention_heads,
        "key and value width": config.kv_heads * config.head_size,
        "intermediate_size": config.intermediate_size,
    }
    for words, size in cut.items():
        if size % tp:
            legal = [n for n in range(1, tp) if all(width % n == 0 for width in cut.values())]
            raise UserError(f"{tp} ranks do not divide the model's {words} of {size}; start {legal[-1]}")


@contextmanager
def load_here(path: Path, device: str, dtype: str, *, average: bool = False) -> Iterator[tuple[Loaded, bool]]:
    """The model as the options `--device` and `--dtype` ask, cut over the ranks that a launcher has started.

    Inside, its process group stands; the second value says whether this rank is the first. UserError as `load_model`.
    """
    launch = Launch.from_environment()
    where, kind = pick(device, dtype, launch)
    if launch.world_size == 1:
        yield load_model(path, where, kind, average=average), True
        return
    # torch 2.13 renames collectives that 2.11 knows by their old names only.
    warnings.filterwarnings("ignore", "`torch.distributed.*` is deprecated", FutureWarning)
    launch.prepare(where)
    # No one takes the marks of its clock, which would grow with every token.
    tp = replace(build_mesh(Topology(tp=launch.world_size), launch, where).tp, timed=nullcontext)
    try:
        yield load_model(path, where, kind, tp, average=average), tp.rank == 0
    finally:
        dist.destroy_process_group()


def load_alone(path: Path, device: str, dtype: str, *, average: bool = False) -> Loaded:
    """The same in one process. UserError under a launcher of several."""
    launch = Launch.from_environment()
    if launch.world_size > 1:
        raise UserError(f"{launch.world_size} ranks were started, and this command is of one process; start it alone")
    return load_model(path, *pick(device, dtype, launch), average=average)


def pick(device: str, dtype: str, launch: Launch) -> tuple[torch.device, str]:
    """The device and the type that `--device` and `--dtype` ask for. UserError for what is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device} is not known; use auto, cpu or cuda")
    if dtype not in ("auto", *DTYPES):
        raise UserError(f"--dtype {dtype} is not known; use auto, {' or '.join(DTYPES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda, but this machine has no CUDA device; use --device cpu")
    where = pick_device(device, launch.local_rank, own=launch.by_tasks)
    return where, dtype if dtype != "auto" else "bf16" if where.type == "cuda" else "fp32"
