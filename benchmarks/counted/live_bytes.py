"""Bytes of tensors, counted while a program runs."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors made inside and still held, and the most that there were; what is `known` does not count."""

    def __init__(self, known: Iterable[torch.UntypedStorage] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: dict[int, object] = {storage._cdata: storage for storage in known}

    def see(self, storages: Iterable[torch.UntypedStorage]) -> None:
        """Count these as well, though made before."""
        for storage in storages:
            self._see(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.device.type != "meta":
                self._see(leaf.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self._seen:
            return

        def freed(_: object) -> None:
            self.now -= size
            del self._seen[place]

        self._seen[place] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
