"""fp32 sums of the gradients of a step at ZeRO 1, and how each data-parallel rank gets its part of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megallama.parallel.mesh import Axis


@dataclass(frozen=True)
class FlatGroup:
    """Parameters side by side in flat tensors, of which each data-parallel rank owns an equal part."""

    parameters: Sequence[nn.Parameter]
    weights: Tensor
    """In the type of training, padded to a multiple of the ranks; the parameters are views of it."""
    sums: Tensor
    """fp32, of the same places."""
    master: nn.Parameter
    """This rank's part, fp32."""

    def part(self, flat: Tensor, axis: Axis) -> Tensor:
        """What this rank owns of a flat tensor."""
        return flat.narrow(0, axis.rank * self.master.numel(), self.master.numel())


class GradientSums:
    """Takes each gradient as soon as autograd has it, and sends a group when it has the last one of a step.

    The first gradient of a step is copied, so sums are never set to zero: 6 bytes per parameter in bf16, and 10 for
    each later one. A rank receives the sum of its own part alone, by a reduce-scatter in place, which begins while the
    last backward is still running (arXiv 2006.15704, section 3.2, and 1910.02054, section 7.1).
    """

    def __init__(
        self, groups: Sequence[FlatGroup], passes: Mapping[nn.Parameter, int], data: Axis, sent: torch.dtype
    ) -> None:
        """`passes` are the backwards in which a parameter gets a gradient for each micro-batch; `sent` is the type
        that crosses the ranks.
        """
        self._groups, self._passes, self._data, self._sent = groups, passes, data, sent
        self._places: dict[nn.Parameter, tuple[int, Tensor]] = {}
        for index, group in enumerate(groups):
            sizes = [parameter.numel() for parameter in group.parameters]
            for parameter, place in zip(group.parameters, group.sums[: sum(sizes)].split(sizes), strict=True):
                self._places[parameter] = index, place.view(parameter.shape)
                parameter.register_post_accumulate_grad_hook(self._take)
        self._left = dict.fromkeys(self._places, 0)
        self._empty = set(self._places)
        self._incomplete = [0] * len(groups)
        self._to_send: list[int] = []
        self._on_its_way: list[tuple[dist.Work, Tensor, Tensor]] = []

    def begin(self, micro_batches: int) -> None:
        """Forget what there is: a step of so many micro-batches begins."""
        self._wait()
        self._left = {parameter: self._passes[parameter] * micro_batches for parameter in self._places}
        self._empty = set(self._places)
        self._incomplete = [len(group.parameters) for group in self._groups]
        # In one order on every rank. Backward ends where the model begins; the last group is that of the norms.
        self._to_send = [len(self._groups) - 1, *range(len(self._groups) - 1)]

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Take what was written into `grad` past autograd's hooks."""
        for parameter in parameters:
            if parameter.grad is not None:
                self._take(parameter)

    def finish(self) -> None:
        """Send what is left, and wait: from here on each rank has the sum over all ranks in its own part."""
        for parameter in self._empty:
            self._places[parameter][1].zero_()
        self._incomplete = [0] * len(self._groups)
        self._send()
        self._wait()

    @torch.no_grad()
    def _take(self, parameter: nn.Parameter) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        index, total = self._places[parameter]
        left = self._left[parameter]
        assert left > 0, "a gradient more than the schedule has backwards: its sum may be on its way"
        self._left[parameter] = left - 1
        if parameter in self._empty:
            self._empty.discard(parameter)
            total.copy_(gradient)
        else:
            total.add_(gradient)
        if left == 1:
            self._incomplete[index] -= 1
            if not self._incomplete[index]:
                self._send()

    def _send(self) -> None:
        """Send the groups that are complete, up to the first that is not."""
        while self._to_send and not self._incomplete[self._to_send[-1]]:
            group = self._groups[self._to_send.pop()]
            if self._data.size == 1:
                continue
            sent = group.sums if self._sent == group.sums.dtype else group.sums.to(self._sent)
            part = group.part(sent, self._data)
            with self._data.timed():
                work = dist.reduce_scatter_tensor(part, sent, group=self._data.group, async_op=True)
            self._on_its_way.append((work, part, group.part(group.sums, self._data)))

    def _wait(self) -> None:
        for work, part, mine in self._on_its_way:
            with self._data.timed():
                work.wait()
            if part.dtype != mine.dtype:
                mine.copy_(part)
        self._on_its_way.clear()
