"""Where a bad line stands: the builder counts lines of what it is given, a user those of files."""

from __future__ import annotations

from pathlib import Path

from fastllm_data.inputs import Source
from fastllm_data.streams import CHUNK


class Places:
    """From a source and a line in it, counted from 1, to a file and a line of that file.

    Parquet rows and paragraphs are counted like lines.
    """

    def __init__(self) -> None:
        self._before: dict[tuple[str, int], int] = {}

    def of(self, source: Source, line: int) -> tuple[str, int]:
        if source.kind == "list":
            return source.files[line - 1], 1
        if source.begin == 0:
            return source.name, line
        # Only wanted when a line is bad, so the lines before a part are counted only then.
        part = (source.name, source.begin)
        if part not in self._before:
            self._before[part] = _lines_before(source)
        return source.name, line + self._before[part]


def _lines_before(source: Source) -> int:
    """Lines that start before the first line which the part owns."""
    left, lines, last = source.begin, 0, b"\n"
    with Path(source.name).open("rb") as file:
        while left > 0 and (chunk := file.read(min(CHUNK, left))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
            last = chunk[-1:]
    return lines if last == b"\n" else lines + 1
