"""Input files: which there are, and how their lines reach the builder."""

from __future__ import annotations

import glob
import gzip
import json
import os
import sys
import zlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from fastllm_core import DatasetBuilder
from fastllm_data.errors import UserError

CHUNK = 1 << 20


@dataclass(frozen=True)
class Source:
    """One input. ``kind``: plain, gz, or stdin."""

    name: str
    kind: str
    size: int  # bytes on disk; 0 for stdin

    def describe(self) -> dict[str, Any]:
        return {"file": self.name, "kind": self.kind, "bytes": self.size}


def find_sources(patterns: tuple[str, ...]) -> list[Source]:
    """Expand files, globs and ``-`` (standard input), in order; the files of a glob by name."""
    sources: list[Source] = []
    for pattern in patterns:
        if pattern == "-":
            sources.append(Source("standard input", "stdin", 0))
            continue
        path = Path(pattern)
        # A glob that matches is for shells that did not expand it; a real name wins.
        matches = (
            [path]
            if path.exists()
            else [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
        )
        if not matches:
            raise UserError(f"{pattern}: no such file")
        sources.extend(_file(match) for match in matches)
    return sources


def _file(path: Path) -> Source:
    if path.is_dir():
        raise UserError(f"{path}: is a folder", f"name its files: '{path}/*.jsonl'")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: cannot be read")
    kind = "gz" if path.suffix == ".gz" else "plain"
    if kind == "plain" and not path.is_file():
        kind = "pipe"
    return Source(str(path), kind, path.stat().st_size)


def add_source(
    builder: DatasetBuilder, source: Source, offset: int, line: int, step: int
) -> Iterator[tuple[int, int]]:
    """Hand the lines of one input to the builder, from byte ``offset`` (after ``line`` lines) on.

    After about every ``step`` bytes, when all lines so far are written, yields how many bytes (of
    the decompressed content) and lines that is.
    """
    if source.kind == "plain":
        # A segment owns the lines that start in it, so any offset is a good one to go on from.
        while offset < source.size:
            end = min(source.size, offset + step)
            builder.add_file(source.name, offset, end, line)
            offset, line = end, builder.lines_in_source
            yield offset, line
        return
    with open_source(source) as stream:
        _skip(stream, offset, source)
        builder.begin_stream(source.name, line)
        fed = 0
        while chunk := stream.read(CHUNK):
            newline = chunk.rfind(b"\n") + 1
            builder.feed(chunk[:newline] if newline else chunk)
            fed += len(chunk)
            if newline and fed >= step:
                builder.end_stream()
                yield offset + fed - (len(chunk) - newline), builder.lines_in_source
                builder.begin_stream(source.name, builder.lines_in_source)
                offset, fed = offset + fed, 0
            if newline:
                builder.feed(chunk[newline:])
        builder.end_stream()
        yield offset + fed, builder.lines_in_source


def _skip(stream: BinaryIO, offset: int, source: Source) -> None:
    while offset > 0:
        chunk = stream.read(min(CHUNK, offset))
        if not chunk:
            raise UserError(f"{source.name}: shorter than when the run was stopped")
        offset -= len(chunk)


@contextmanager
def open_source(source: Source) -> Generator[BinaryIO]:
    """The decompressed bytes of an input."""
    if source.kind == "stdin":
        yield sys.stdin.buffer
    elif source.kind == "gz":
        try:
            with gzip.open(source.name, "rb") as stream:
                yield cast(BinaryIO, stream)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{source.name}: damaged gzip data: {error}") from error
    else:
        with Path(source.name).open("rb") as stream:
            yield stream


def sample_texts(source: Source, keys: tuple[str, ...], count: int) -> list[str]:
    """About ``count`` texts spread over an input, for comparing encoders.

    Lines that are not what they should be are passed over here: the builder reports them.
    """
    if source.kind not in ("plain", "gz"):
        return []
    texts: list[str] = []
    with open_source(source) as stream:
        for i in range(count):
            if source.kind == "plain" and i > 0:
                stream.seek(source.size * i // count)
                stream.readline()
            line = stream.readline(CHUNK)
            if not line:
                break
            texts.extend(_texts(line, keys))
    return texts


def _texts(line: bytes, keys: tuple[str, ...]) -> Iterator[str]:
    try:
        record: Any = json.loads(line)
        for key in keys:
            value: Any = record[key]
            texts = cast(list[Any], value) if isinstance(value, list) else [value]
            for text in texts:
                text.encode()  # a lone surrogate is no text
                yield text
    except (ValueError, KeyError, TypeError, AttributeError):
        return
