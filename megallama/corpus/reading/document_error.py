"""What is wrong with one document, or with the rest of a file."""

from __future__ import annotations

from megallama.errors import UserError


class DocumentError(UserError):
    """A UserError about a document of a file, of a kind that can be counted while the others are read."""

    def __init__(self, sentence: str, kind: str = "") -> None:
        super().__init__(sentence)
        self.kind = kind
