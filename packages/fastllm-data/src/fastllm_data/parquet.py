"""Parquet inputs, a few megabytes at a time: the extra ``fastllm-data[parquet]``."""

from __future__ import annotations

import importlib
import io
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastllm_core import write_json_lines
from fastllm_data.errors import UserError
from fastllm_data.inputs import Source
from fastllm_data.streams import Meter, open_source

if TYPE_CHECKING:
    from fastllm_core._core import StringBuffers
    from fastllm_data.documents import Piece

BATCH_BYTES = 2 << 20
MAX_BATCH = 8192  # rows
PAGE_BUFFER = 1 << 20  # read of a column at a time, so that a large row group needs little memory


def parquet_pieces(
    source: Source, keys: tuple[str, ...], start: int, meter: Meter
) -> Iterator[Piece]:
    """Rows from ``start`` on as lines of JSON; positions are numbers of rows.

    keys: columns of strings, or of lists of them; none: all columns, whatever they hold.

    Raises UserError for a file that is damaged, or without these columns of strings.
    """
    try:
        arrow: Any = importlib.import_module("pyarrow")
        reader: Any = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise UserError(
            f"{source.name}: Parquet needs pyarrow", "pip install 'fastllm-data[parquet]'"
        ) from error
    arrow.set_memory_pool(arrow.system_memory_pool())  # the others keep what they have freed
    row = start
    with open_source(source) as stream:
        try:
            seekable = stream if stream.seekable() else io.BytesIO(stream.read())
            file: Any = reader.ParquetFile(seekable, buffer_size=PAGE_BUFFER, pre_buffer=False)
            _check_columns(source, keys, file.schema_arrow, arrow.types)
            rows = int(file.metadata.num_rows)
            meter_start = meter.bytes
            for group, skip in _groups(file.metadata, start):
                size = _batch_rows(file.metadata.row_group(group))
                for batch in file.iter_batches(
                    size, row_groups=[group], columns=list(keys) or None
                ):
                    if skip >= batch.num_rows:
                        skip -= batch.num_rows
                        continue
                    wanted = batch.slice(skip)
                    skip = 0
                    row += wanted.num_rows
                    meter.bytes = meter_start + source.size * row // max(1, rows)
                    yield _lines(wanted, arrow), row
        except (arrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise
            said = " ".join(str(error).split())
            raise UserError(f"{source.name}: row {row + 1}: damaged Parquet: {said}") from error


def _lines(batch: Any, arrow: Any) -> bytes:
    """A line of JSON a row. Strings go from Arrow's memory into it as they are: an object for each
    would take up to four bytes a character, and a huge row several such copies."""
    columns = [_string_buffers(column, arrow.types) for column in batch.columns]
    strings = [column for column in columns if column is not None]
    if len(strings) == len(columns):
        return write_json_lines(batch.schema.names, strings, batch.num_rows)
    return b"".join(map(_line, _records(batch, arrow)))


def _string_buffers(column: Any, types: Any) -> StringBuffers | None:
    wide = bool(types.is_large_string(column.type))
    if not wide and not types.is_string(column.type):
        return None
    validity, offsets, data = column.buffers()
    return validity, offsets, data, int(column.offset), wide


def _records(batch: Any, arrow: Any) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        # Not UTF-8, which no writer should make: the bytes stay, for the builder to find.
        columns: list[list[Any]] = []
        for column in batch.columns:
            found: list[bytes | None] = column.cast(arrow.large_binary()).to_pylist()
            columns.append([t and t.decode("utf-8", "surrogateescape") for t in found])
        names: list[str] = batch.schema.names
        return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def _line(record: dict[str, Any]) -> bytes:
    return (
        json.dumps(record, ensure_ascii=False, default=str).encode("utf-8", "surrogateescape")
        + b"\n"
    )


def _groups(metadata: Any, start: int) -> Iterator[tuple[int, int]]:
    """Row groups that hold rows from ``start`` on, and how many rows of each to pass over."""
    before = 0
    for group in range(metadata.num_row_groups):
        rows = int(metadata.row_group(group).num_rows)
        if before + rows > start:
            yield group, max(0, start - before)
        before += rows


def _batch_rows(group: Any) -> int:
    mean = int(group.total_byte_size) // max(1, int(group.num_rows))
    return max(1, min(MAX_BATCH, BATCH_BYTES // max(1, mean)))


def _check_columns(source: Source, keys: tuple[str, ...], schema: Any, types: Any) -> None:
    for key in keys:
        if key not in schema.names:
            near = ", ".join(schema.names[:20])
            raise UserError(f"{source.name}: no column {key!r}", f"its columns: {near}")
        kind = schema.field(key).type
        if types.is_list(kind) or types.is_large_list(kind):
            kind = kind.value_type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise UserError(f"{source.name}: column {key!r} holds {kind}, not strings")
