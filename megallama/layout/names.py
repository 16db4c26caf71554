"""Layouts by name, as `tp2-dp2-zero3-nosp-acc4-full` or `pp4-dualpipev-tp2`. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal, cast, get_args

from megallama.config.schema import AXIS_KEYS, ContextMode, ModelConfig, ParallelConfig, RunConfig, Schedule
from megallama.errors import UserError
from megallama.layout.batching import gradient_accumulation_steps
from megallama.layout.schedules import SCHEDULES, legal_micro_batches, stage_ranks
from megallama.layout.topology import AXES, Topology


@dataclass(frozen=True)
class Layout(Topology):
    """One way to spread the same training over processes: a mesh, and how it is used."""

    context_mode: ContextMode = "gather"
    schedule: Schedule = "1f1b"
    chunks: int = 2
    """Stages of each rank under interleaved1f1b."""
    split: tuple[int, ...] = ()
    """Decoder layers of each stage; empty for the balanced split."""
    zero: int = 1
    sequence: bool = True
    accumulation: int | None = None
    """Micro-batches of each rank per step; None for the fewest that the schedule takes."""
    recompute: str = "none"
    offload_optimizer: Literal["none", "cpu"] = "none"

    @property
    def name(self) -> str:
        """The name that parses to this layout."""
        words = [f"tp{self.tp}"] if self.tp > 1 else []
        words += [f"pp{self.pp}"] if self.pp > 1 else []
        words += [self.schedule] if self.schedule != "1f1b" else []
        words += [f"chunks{self.chunks}"] if self.chunks > 2 else []
        words += ["split" + "+".join(map(str, self.split))] if self.split else []
        others = {axis: getattr(self, axis) for axis in AXES if axis not in ("tp", "pp")}
        words += [f"{axis}{size}" for axis, size in others.items() if size > 1]
        words += [self.context_mode] if self.context_mode != "gather" else []
        words += [f"zero{self.zero}"]
        words += ["host"] if self.offload_optimizer == "cpu" else []
        words += ["nosp"] if self.tp > 1 and not self.sequence else []
        words += [f"acc{self.accumulation}"] if self.accumulation else []
        words += [self.recompute] if self.recompute != "none" else []
        return "-".join(words)

    @property
    def parallel(self) -> ParallelConfig:
        """The section of the configuration."""
        sizes: dict[str, Any] = {key: getattr(self, axis) for axis, key in AXIS_KEYS.items()}
        return ParallelConfig(
            **sizes,
            context_mode=self.context_mode,
            sequence=self.sequence,
            schedule=self.schedule,
            chunks=self.chunks,
            layers_per_stage=self.split or "balanced",
        )

    @property
    def stages(self) -> int:
        """The number of stages."""
        return len(stage_ranks(self.parallel))

    @property
    def micro_batches(self) -> int:
        """The number of micro-batches of each data-parallel rank per step."""
        return self.accumulation or next(n for n in count(1) if legal_micro_batches(self.parallel, n))

    def apply(self, tree: dict[str, Any]) -> None:
        """Make a dumped configuration run at this layout."""
        tree["parallel"] = self.parallel.model_dump()
        tree["zero"] |= {"stage": self.zero, "offload_optimizer": self.offload_optimizer}
        tree["train"]["recompute"] = self.recompute
        smallest = [*tree["train"]["batch_ramp"], tree["train"]][0]["global_batch_size"]
        tree["train"]["micro_batch_size"] = smallest // (self.dp * self.micro_batches)


ONE_PROCESS = Layout()


def layout_of(config: RunConfig, dp: int) -> Layout:
    """The layout of a legal run of `dp` copies, with its micro-batches where they are not the fewest.

    UserError if the batch does not divide over the copies.
    """
    parallel = config.parallel
    cut = parallel.layers_per_stage
    layout = Layout(
        dp=dp,
        **parallel.sizes,
        context_mode=parallel.context_mode if parallel.context > 1 else "gather",
        schedule=parallel.schedule if parallel.pipeline > 1 else "1f1b",
        chunks=parallel.chunks if parallel.schedule == "interleaved1f1b" else 2,
        split=() if isinstance(cut, str) else tuple(cut),
        zero=config.zero.stage,
        sequence=parallel.sequence is not False,
        recompute=config.train.recompute,
        offload_optimizer=config.zero.offload_optimizer,
    )
    micro_batches = gradient_accumulation_steps(config, dp)
    return layout if micro_batches == layout.micro_batches else replace(layout, accumulation=micro_batches)


def _sized(layout: Layout, axis: str, size: int) -> Layout:
    sizes: dict[str, Any] = {axis: size}
    return replace(layout, **sizes)


_WORDS: dict[str, Callable[[Layout, str], Layout]] = {
    **{rf"({axis}[1-9]\d*)": lambda layout, word: _sized(layout, word[:2], int(word[2:])) for axis in AXES},
    f"({'|'.join(SCHEDULES)})": lambda layout, word: replace(layout, schedule=cast(Schedule, word)),
    r"chunks([2-9]|[1-9]\d+)": lambda layout, n: replace(layout, chunks=int(n)),
    r"split([1-9]\d*(?:\+[1-9]\d*)*)": lambda layout, n: replace(layout, split=tuple(map(int, n.split("+")))),
    f"({'|'.join(get_args(ContextMode))})": lambda layout, word: replace(layout, context_mode=cast(ContextMode, word)),
    r"zero([1-3])": lambda layout, n: replace(layout, zero=int(n)),
    r"acc([1-9]\d*)": lambda layout, n: replace(layout, accumulation=int(n)),
    r"(host)": lambda layout, _: replace(layout, offload_optimizer="cpu"),
    r"(nosp)": lambda layout, _: replace(layout, sequence=False),
    r"(selective|full|offload)": lambda layout, word: replace(layout, recompute=word),
}


def parse_layout(name: str) -> Layout:
    """The layout of that name; UserError for a word that is none, or that the schedule has no use for."""
    layout = ONE_PROCESS
    for word in name.split("-"):
        for pattern, apply in _WORDS.items():
            if match := re.fullmatch(pattern, word):
                layout = apply(layout, match[1])
                break
        else:
            raise UserError(
                f"unknown word {word!r} in layout {name!r}; a layout is made of tpN, ppN, dpN, cpN and accN with N "
                "from 1, zeroN with N from 1 to 3, interleaved1f1b, dualpipev, zbvzerobubble, chunksN with N from 2, "
                "splitN+N+..., ulysses, host, nosp, selective, full and offload, as tp2-dp2-zero3 or pp2-dualpipev"
            )
    if "chunks" in name and SCHEDULES[layout.schedule].stages_per_rank is not None:
        raise UserError(
            f"chunks{layout.chunks} in layout {name!r} goes with interleaved1f1b only, and its schedule is "
            f"{layout.schedule}; use {replace(layout, schedule='interleaved1f1b').name}, or leave it out"
        )
    return layout


def default_layouts(model: ModelConfig) -> list[Layout]:
    """One of each kind that `model` can run.

    Tied embeddings leave out the pipelines that begin and end on different ranks, and key heads that cp does not divide
    leave out ulysses.
    """
    layouts = [parse_layout(name) for name in DEFAULT_LAYOUTS]
    if model.tie_word_embeddings:
        layouts = [each for each in layouts if each.pp == 1 or SCHEDULES[each.schedule].v_shaped]
    return [each for each in layouts if each.context_mode == "gather" or model.kv_heads % each.cp == 0]


DEFAULT_LAYOUTS = (
    "zero2",
    "zero3",
    "acc4",
    "selective",
    "full",
    "dp2",
    "dp2-zero2",
    "dp2-zero3",
    "cp2",
    "cp2-ulysses",
    "tp2-cp2",
    "tp2",
    "tp2-nosp",
    "tp2-zero3",
    "dp4-zero3",
    "tp4",
    "tp2-dp2",
    "tp2-dp2-zero3-acc4-full",
    "pp2",
    "pp2-interleaved1f1b-acc4",
    "pp2-dualpipev",
    "pp2-zbvzerobubble-acc4",
    "pp2-dp2",
    "tp2-pp2-zbvzerobubble-acc4-full",
    "pp4",
)
