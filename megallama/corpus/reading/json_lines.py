"""Documents from lines of JSON: one per line, the text field of an object."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from megallama.corpus.reading.blocks import BLOCK_BYTES, DocumentError, Reading
from megallama.corpus.reading.bombs import LONGEST_GAP, BombWatch
from megallama.corpus.reading.lines import BOM, Lines
from megallama.system.remote import SourcePath
from megallama.text.surrogates import without_surrogates


class JsonLines:
    """A BlockFile of JSON lines, compressed or not."""

    def __init__(self, path: SourcePath, reading: Reading) -> None:
        self._lines = Lines(path)
        self._field = Field(reading.text_field)
        self._stops = reading.on_error == "stop"
        self._bombs = BombWatch(self._lines)
        self._number = 0

    def close(self) -> None:
        self._lines.close()

    @property
    def file_bytes(self) -> int:
        return self._lines.file_bytes

    def begin(self, number: int) -> bool:
        lines, start = self._lines, number * BLOCK_BYTES
        self._number = number
        while lines.position < start and lines.more():
            limit = min(start, self._bombs.limit())
            if lines.position < limit:
                lines.skip_to(limit)
            else:
                self._read(Counter())
        self._check_damage()
        return lines.position > start or (lines.position == start and lines.more()) or self._is_damaged_here()

    def documents(self, left_out: Counter[str]) -> Iterator[str]:
        end, gap = (self._number + 1) * BLOCK_BYTES, 0
        while self._lines.position < end and self._lines.more():
            text = self._read(left_out)
            if text is not None and not self._lines.damage:
                yield text
            gap = 0 if text else gap + 1
            if gap > LONGEST_GAP:  # the rest of the block is not worth the time
                self._leave_out(self._gap(gap), left_out)
                self._lines.skip_to(end)
        self._check_damage()
        if self._lines.damage and self._is_damaged_here():
            left_out[self._lines.damage.kind] += 1

    def _read(self, left_out: Counter[str]) -> str | None:
        """The text of the next line, if it has one."""
        number, begin = self._lines.number, self._lines.position
        text = None
        try:
            line = self._lines.read()
            if line is None:
                return None
            text = self._text(line, number, begin)
        except DocumentError as error:
            self._leave_out(error, left_out)
        self._bombs.read(begin, bool(text))
        return text

    def _gap(self, lines: int) -> DocumentError:
        return DocumentError(
            f"{self._lines.place} has {lines:,} lines in a row without text before it: refused as a bomb; take them "
            "out",
            "bomb",
        )

    def _leave_out(self, error: DocumentError, left_out: Counter[str]) -> None:
        if self._stops:
            raise error
        left_out[error.kind] += 1

    def _check_damage(self) -> None:
        if self._lines.damage and self._stops:
            raise self._lines.damage

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
