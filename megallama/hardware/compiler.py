"""Whether torch's compiler finds on this machine what it needs, as a run that insists on it must."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from torch.utils._triton import has_triton

from megallama.config.schema import RunConfig
from megallama.errors import UserError
from megallama.layout.compiled import compiles_attention


def check_compiler(config: RunConfig, device: torch.device) -> None:
    """UserError where train.compile=true, or the attention of documents, has no compiler here."""
    on_gpu = device.type == "cuda"
    if compiles_attention(config, on_gpu) and not can_compile(on_gpu):
        key = "data.document_mask=true" if config.data.document_mask else "data.pad=left"
        raise UserError(
            f"{key} needs {needed_to_compile(on_gpu)} for attention on a GPU, and some of it is not here; install it, "
            f"or use {'data.document_mask=false' if config.data.document_mask else 'data.pad=right'}"
        )
    if config.train.compile is True and not can_compile(on_gpu):
        raise UserError(
            f"train.compile=true needs {needed_to_compile(on_gpu)}, and some of it is not here; install it, or use "
            "train.compile=auto"
        )


def can_compile(on_gpu: bool) -> bool:
    """Whether torch.compile would find Triton and its C compiler on a GPU, else a C++ compiler.

    Both also build against the headers of Python, which a system's own Python often comes without.
    """
    if on_gpu and not has_triton():
        return False
    named = os.environ.get("CC" if on_gpu else "CXX")
    names = [named] if named else ["gcc", "clang"] if on_gpu else ["g++"]
    return any(map(shutil.which, names)) and Path(sysconfig.get_path("include"), "Python.h").is_file()


def needed_to_compile(on_gpu: bool) -> str:
    """The same for a sentence."""
    return f"{'triton and a C compiler' if on_gpu else 'a C++ compiler'} and the headers of Python"
