"""Documents from lines of JSON: one per line, the text field of an object."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from megallama.corpus.blocks import BLOCK_BYTES, Reading
from megallama.corpus.document_error import DocumentError
from megallama.corpus.lines import BOM, Lines
from megallama.errors import UserError
from megallama.system.remote import SourcePath
from megallama.text.surrogates import without_surrogates

LARGEST_GAP = 1 << 30
LONGEST_GAP = 1_000_000
"""Bytes and lines in a row without text that are read. No corpus has as many; a bomb of a few megabytes has, in any
compression, while text that repeats itself may shrink as far."""


class JsonLines:
    """A BlockFile of JSON lines, compressed or not."""

    def __init__(self, path: SourcePath, reading: Reading) -> None:
        self._lines = Lines(path)
        self._reading = reading
        self._field = Field(reading.text_field)
        self._number = 0
        self._gap_lines, self._gap = 0, 0  # since the last line with text, of those that were read

    def close(self) -> None:
        self._lines.close()

    def begin(self, number: int) -> bool:
        lines, start = self._lines, number * BLOCK_BYTES
        self._number = number
        lines.skip_to(start)
        return lines.position > start or (lines.position == start and lines.more()) or self._is_damaged_here()

    def documents(self, left_out: Counter[str]) -> Iterator[str]:
        lines, end = self._lines, (self._number + 1) * BLOCK_BYTES
        while lines.position < end:
            number, position = lines.number, lines.position
            try:
                line = lines.read()
                if line is None:
                    break
                text = self._text(line, number, position)
            except DocumentError as error:
                if self._reading.on_error == "stop":
                    raise
                left_out[error.kind] += 1
                text = None
            self._check_gap(bool(text), lines.position - position)
            if text is not None:
                yield text
        if lines.damage and self._reading.on_error == "stop":
            raise UserError(lines.damage)
        if self._is_damaged_here():
            left_out["damaged stream"] += 1

    def _is_damaged_here(self) -> bool:
        return self._lines.damage is not None and self._lines.position // BLOCK_BYTES == self._number

    def _text(self, line: bytes, number: int | None, position: int) -> str | None:
        """The text of a line, None if it is blank; DocumentError."""
        if not position:
            line = line.removeprefix(BOM)
        if line.isspace() or not line:
            return None
        try:
            return self._field.text(line)
        except DocumentError as error:
            place = f"{self._lines.path}:{number}" if number else f"{self._lines.path}, at byte {position:,},"
            raise DocumentError(f"{place} {error}", error.kind) from None

    def _check_gap(self, has_text: bool, size: int) -> None:
        if has_text:
            self._gap_lines, self._gap = 0, 0
            return
        self._gap_lines += 1
        self._gap += size
        if self._gap_lines > LONGEST_GAP or self._gap > LARGEST_GAP:
            last = self._lines.number and f" after line {self._lines.number - 1 - self._gap_lines}"
            raise UserError(
                f"{self._lines.path} has {self._gap_lines:,} lines of {self._gap:,} bytes in a row without text"
                f"{last or ''}: refused as a bomb; take them out"
            )


class Field:
    """Where the text stands in a JSON object."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._path = name.split(".")

    def text(self, line: bytes) -> str:
        """The text of the object that a line is; DocumentError, whose sentence goes on from the name of the line."""
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            bad = line[error.start : error.end]
            raise DocumentError(
                f"is no JSON of UTF-8 near {bad!r}; convert it, or take the line out", "not UTF-8"
            ) from None
        except RecursionError:
            raise DocumentError(
                "is no JSON object of text: it is nested too deeply; take the line out", "not JSON"
            ) from None
        except ValueError as error:
            raise DocumentError(f"is no JSON object: {error}", "not JSON") from None
        text = self._value(record)
        if not isinstance(text, str):
            raise DocumentError(
                f"has {_json_type(text)} in field {self._name!r}, not text; take the line out, or name another field: "
                "--text-field",
                "missing field" if text is None else "not text",
            )
        # A line of UTF-8 has no half of a surrogate pair but one that JSON escapes.
        return without_surrogates(text) if b"\\u" in line else text

    def _value(self, record: object) -> object:
        if not isinstance(record, dict):
            raise DocumentError(
                f"is {_json_type(record)}, not a JSON object; write it as {{{self._name!r}: ...}}", "not JSON"
            )
        if self._name in record:
            return record[self._name]
        value: object = record
        for key in self._path:
            if not isinstance(value, dict) or key not in value:
                found = ", ".join(sorted(record)[:8])
                raise DocumentError(
                    f"has no text in field {self._name!r}, only {found or 'nothing'}; name it: --text-field",
                    "missing field",
                )
            value = value[key]
        return value


def _json_type(value: object) -> str:
    """What JSON calls it."""
    names = {
        bool: "a boolean",
        int: "a number",
        float: "a number",
        str: "a string",
        list: "an array",
        dict: "an object",
    }
    return names.get(type(value), "null")
