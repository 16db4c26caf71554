"""What a mutant is: one mistake, as the replacement of one piece of the source."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Kind = Literal["gradient", "other"]
"""A wrong gradient behind a right forward, or any other wrong result."""


@dataclass(frozen=True)
class Mutant:
    """One collective, gradient rule or piece of rank arithmetic that is left out or swapped."""

    name: str
    path: str
    """Below megallama/."""
    old: str
    """Stands exactly once in the file."""
    new: str
    kind: Kind
    breaks: str
    layout: str = "tp2"
    """At which `megallama verify` is asked."""
    words: tuple[str, ...] = ()
    """What it is told besides: options, and overrides of the config."""
    reason: str = ""
    """Why one judge is enough for a mistake of gradients, or that none sees it."""
    in_tiles: bool = False
    """Whether verify's layouts run MLPs in tiles: by itself it has too few tokens for that."""

    def applied(self, package: Path) -> str:
        """The mutated text of the file; ValueError where what it replaces does not stand there exactly once."""
        text = (package / self.path).read_text()
        if (found := text.count(self.old)) != 1:
            raise ValueError(
                f"mutant {self.name}: {self.old!r} stands {found} times in megallama/{self.path}, not once"
            )
        return text.replace(self.old, self.new)
