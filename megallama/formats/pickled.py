"""Tensors in torch's own files, which are pickles: read without the code that one can hold."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from megallama.errors import UserError
from megallama.system.regular_file import open_regular

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.bin` or `.pth` file by name, mapped from it.

    UserError if it cannot be read, is of torch before 1.6, or holds code or anything else but plain tensors.
    """
    try:
        open_regular(path).close()
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); complete the folder") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path} is a pickle of more than tensors, and is not loaded; give safetensors") from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(
            f"{path} is no whole file of torch.save since 1.6; copy it again, or give safetensors"
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or type(tensor) is not Tensor:
            raise UserError(f"{path} holds {name!r:.80} that is no tensor; expected tensors by name")
        if tensor.dtype not in _DTYPES or tensor.layout is not torch.strided:
            raise UserError(f"{path} has {name} in {tensor.dtype}; expected float32, bfloat16 or float16")
    return content
