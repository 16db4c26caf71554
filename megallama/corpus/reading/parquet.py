"""Documents from Parquet: a column of text, one document per row, read by pyarrow in batches of rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megallama.corpus.reading.blocks import DocumentError, Reading
from megallama.corpus.reading.lines import LARGEST_RECORD, refusals_named
from megallama.errors import UserError
from megallama.system.remote import SourcePath, open_source_file, source_state

BATCH_BYTES = 8 << 20
MOST_ROWS = 1024


class ParquetRows:
    """A BlockFile of Parquet, whose row groups are the blocks. What is damaged is a row group, or the whole file."""

    def __init__(self, path: SourcePath, reading: Reading) -> None:
        try:
            import pyarrow
            import pyarrow.compute
            import pyarrow.parquet
        except ModuleNotFoundError:
            raise UserError(f"{path} needs pyarrow to be read; pip install 'megallama[parquet]'") from None
        self._types, self._compute = pyarrow.types, pyarrow.compute
        self._damages = (pyarrow.ArrowException, OSError, UnicodeDecodeError)
        self._path = path
        self._field = reading.text_field
        self._stops = reading.on_error == "stop"
        self._number = 0
        self._damage: DocumentError | None = None
        with refusals_named(path):
            self._file = open_source_file(path)
        try:
            with self._damage_named():
                metadata = pyarrow.parquet.read_metadata(self._file)
                columns = {metadata.schema.column(number).path for number in range(metadata.num_columns)}
                self._parquet = pyarrow.parquet.ParquetFile(
                    self._file,
                    metadata=metadata,
                    read_dictionary=list(columns & {self._field}),  # a text that is repeated is held once
                    buffer_size=1 << 20,
                    pre_buffer=False,
                )
                self._groups = metadata.num_row_groups
        except DocumentError as error:
            if self._stops:
                self.close()
                raise
            self._damage, self._groups = error, 1

    def close(self) -> None:
        self._file.close()

    @property
    def file_bytes(self) -> int:
        return source_state(self._path)[0] * self._number // max(1, self._groups)

    def begin(self, number: int) -> bool:
        self._number = number
        return number < self._groups

    def documents(self, left_out: Counter[str]) -> Iterator[str]:
        try:
            if self._damage:
                raise self._damage
            for row, value in enumerate(self._values(left_out), start=1):
                try:
                    text = self._text(value, f"row {row:,} of row group {self._number}")
                except DocumentError as error:
                    self._leave_out(error, left_out)
                else:
                    yield text
        except DocumentError as error:
            self._leave_out(error, left_out)

    def _leave_out(self, error: DocumentError, left_out: Counter[str], rows: int = 1) -> None:
        if self._stops:
            raise error
        left_out[error.kind] += rows

    def _values(self, left_out: Counter[str]) -> Iterator[Any]:
        """The value of each row of the block, as pyarrow holds it; DocumentError for damage."""
        with self._damage_named():
            group = self._parquet.metadata.row_group(self._number)
            try:
                path = self._column_path()
            except DocumentError as error:
                self._leave_out(error, left_out, group.num_rows)
                return
            columns = [group.column(number) for number in range(group.num_columns)]
            size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == self._field)
            rows = max(1, min(MOST_ROWS, group.num_rows * BATCH_BYTES // max(1, size)))
            for batch in self._parquet.iter_batches(rows, [self._number], [self._field], use_threads=False):
                column = batch.column(batch.schema.names.index(path[0]))
                yield from self._compute.struct_field(column, path[1:]) if path[1:] else column

    def _column_path(self) -> list[str]:
        """Names of the column, and of the fields in it, where the text is; DocumentError if it is not there."""
        schema = self._parquet.schema_arrow
        path = [self._field] if self._field in schema.names else self._field.split(".")
        fields = {field.name: field for field in schema}
        for name in path:
            if name not in fields:
                found = ", ".join(schema.names[:8])
                raise DocumentError(
                    f"{self._path} has no text in column {self._field!r}, only {found or 'nothing'}; name it: "
                    "--text-field",
                    "missing field",
                )
            kind = fields[name].type
            is_struct = self._types.is_struct(kind)
            fields = {kind.field(number).name: kind.field(number) for number in range(kind.num_fields * is_struct)}
        kind = kind.value_type if self._types.is_dictionary(kind) else kind
        if not (self._types.is_string(kind) or self._types.is_large_string(kind)):
            raise DocumentError(
                f"{self._path} has {kind} in column {self._field!r}, not text; name another: --text-field", "not text"
            )
        return path

    def _text(self, value: Any, place: str) -> str:
        content = getattr(value, "value", value)  # of an entry of a dictionary
        buffer = content.as_buffer() if value.is_valid else None
        if buffer is None:
            raise DocumentError(
                f"{self._path} has null in column {self._field!r} at {place}, not text; take the row out, or name "
                "another column: --text-field",
                "missing field",
            )
        if buffer.size > LARGEST_RECORD:
            raise DocumentError(
                f"{self._path} has a text of more than {LARGEST_RECORD >> 20} MiB at {place}; split it", "too long"
            )
        try:
            return str(buffer, "utf-8")
        except UnicodeDecodeError as error:
            bad = buffer.to_pybytes()[error.start : error.end]
            raise DocumentError(f"{self._path} is not UTF-8 near {bad!r} at {place}; convert it", "not UTF-8") from None

    @contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except self._damages as error:
            if isinstance(error, OSError) and error.errno:
                raise UserError(f"{self._path} cannot be read ({error.strerror}); mend that or name another") from None
            what = str(error).splitlines()[0].rstrip(".")
            raise DocumentError(f"{self._path} is damaged or cut short: {what}", "damaged stream") from None
