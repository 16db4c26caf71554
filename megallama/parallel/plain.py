"""Plain values between ranks, sent as the bytes of their JSON.

torch's own collectives of objects pickle: whoever can send to a port of the job then runs code on its ranks.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def from_first(value: Any, group: dist.ProcessGroup | None, device: torch.device) -> Any:
    """The first rank's `value` on every rank of the group, as JSON gives it back: lists for tuples. Two collectives."""
    mine = _encoded(value, device)
    size = torch.tensor([len(mine)], device=device)
    dist.broadcast(size, group=group, group_src=0)
    content = mine if dist.get_rank(group) == 0 else torch.empty(int(size), dtype=torch.uint8, device=device)
    dist.broadcast(content, group=group, group_src=0)
    return _decoded(content)


def of_all(value: Any, group: dist.ProcessGroup | None, device: torch.device) -> list[Any]:
    """Every rank's `value`, in the order of the ranks of the group, as JSON gives them back. Two collectives."""
    mine, ranks = _encoded(value, device), dist.get_world_size(group)
    sizes = torch.empty(ranks, dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(sizes, torch.tensor([len(mine)], device=device), group=group)
    longest = int(sizes.max())
    padded = torch.nn.functional.pad(mine, (0, longest - len(mine)))
    contents = torch.empty(ranks * longest, dtype=torch.uint8, device=device)
    dist.all_gather_into_tensor(contents, padded, group=group)
    rows = contents.view(ranks, longest)
    return [_decoded(row[:size]) for row, size in zip(rows, sizes.tolist(), strict=True)]


def _encoded(value: Any, device: torch.device) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)


def _decoded(content: Tensor) -> Any:
    return json.loads(content.cpu().numpy().tobytes())
