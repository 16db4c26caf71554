"""Layouts by name, as `tp2-dp2-zero3-nosp-acc4-full`. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from megallama.errors import UserError


@dataclass(frozen=True)
class Layout:
    """One way to spread the same training over processes."""

    tp: int = 1
    dp: int = 1
    zero: int = 1
    sequence: bool = True
    accumulation: int = 1
    recompute: str = "none"

    @property
    def world_size(self) -> int:
        """Processes it takes."""
        return self.tp * self.dp

    @property
    def name(self) -> str:
        """The name that parses to this layout."""
        words = [f"tp{self.tp}"] if self.tp > 1 else []
        words += [f"dp{self.dp}"] if self.dp > 1 else []
        words += [f"zero{self.zero}"]
        words += ["nosp"] if self.tp > 1 and not self.sequence else []
        words += [f"acc{self.accumulation}"] if self.accumulation > 1 else []
        words += [self.recompute] if self.recompute != "none" else []
        return "-".join(words)

    def overrides(self, global_batch_size: int) -> list[str]:
        """The configuration keys that make it so."""
        return [
            f"parallel.tensor={self.tp}",
            f"parallel.sequence={str(self.sequence).lower()}",
            f"zero.stage={self.zero}",
            f"train.recompute={self.recompute}",
            f"train.micro_batch_size={global_batch_size // (self.dp * self.accumulation)}",
        ]


ONE_PROCESS = Layout()

_WORDS: dict[str, Callable[[Layout, str], Layout]] = {
    r"tp([1-9]\d*)": lambda layout, n: replace(layout, tp=int(n)),
    r"dp([1-9]\d*)": lambda layout, n: replace(layout, dp=int(n)),
    r"zero([1-3])": lambda layout, n: replace(layout, zero=int(n)),
    r"acc([1-9]\d*)": lambda layout, n: replace(layout, accumulation=int(n)),
    r"(nosp)": lambda layout, _: replace(layout, sequence=False),
    r"(selective|full)": lambda layout, word: replace(layout, recompute=word),
}


def parse_layout(name: str) -> Layout:
    """The layout of that name; UserError for a word that is none."""
    layout = ONE_PROCESS
    for word in name.split("-"):
        for pattern, apply in _WORDS.items():
            if match := re.fullmatch(pattern, word):
                layout = apply(layout, match[1])
                break
        else:
            raise UserError(
                f"unknown word {word!r} in layout {name!r}; a layout is made of tpN, dpN and accN with N from 1, "
                "zeroN with N from 1 to 3, nosp, selective and full, as tp2-dp2-zero3"
            )
    return layout


DEFAULT_LAYOUTS = tuple(
    parse_layout(name)
    for name in (
        "zero2",
        "zero3",
        "acc4",
        "selective",
        "full",
        "dp2",
        "dp2-zero2",
        "dp2-zero3",
        "tp2",
        "tp2-nosp",
        "tp2-zero3",
        "dp4-zero3",
        "tp4",
        "tp2-dp2",
        "tp2-dp2-zero3-acc4-full",
    )
)
