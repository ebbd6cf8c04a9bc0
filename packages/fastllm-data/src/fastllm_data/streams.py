"""The decompressed bytes of an input, with bounded memory, and how far reading has come."""

from __future__ import annotations

import gzip
import importlib
import io
import os
import sys
import zlib
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from fastllm_data.errors import UserError
from fastllm_data.inputs import Source
from fastllm_data.remote import open_url

if sys.version_info >= (3, 14):
    from compression import zstd  # pyright: ignore
else:
    from backports import zstd

CHUNK = 1 << 20
NAMES = {"gz": "gzip", "zst": "zstd"}


class Meter:
    """Bytes read from disk or network, for the progress bar: compressed ones where they are."""

    def __init__(self) -> None:
        self.bytes = 0
        self.native_from: int | None = None  # what the native reader had read when it was started

    def total(self, native: int) -> int:
        """``native``: bytes that the native reader has read of plain files, in all."""
        return self.bytes + (0 if self.native_from is None else native - self.native_from)


class _Metered(io.RawIOBase):
    """A raw stream that counts into a meter."""

    def __init__(self, stream: Any, meter: Meter) -> None:
        self._stream = stream
        self._meter = meter

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._stream.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any) -> int:
        count = int(self._stream.readinto(buffer) or 0)
        self._meter.bytes += count
        return count


def _raw(source: Source) -> BinaryIO:
    if source.kind == "stdin":
        return sys.stdin.buffer
    if source.remote:
        return open_url(source.name, source.size)
    return Path(source.name).open("rb")


def _gzip_reader(raw: io.BufferedReader[Any]) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    try:
        # Intel's decoder, several times faster than zlib (extra fastllm-data[isal]).
        igzip: Any = importlib.import_module("isal.igzip")
        failure: type[Exception] = importlib.import_module("isal.isal_zlib").error
    except ImportError:
        return cast(BinaryIO, gzip.open(raw, "rb")), (gzip.BadGzipFile, zlib.error)
    return igzip.open(raw, "rb"), (gzip.BadGzipFile, zlib.error, failure)


def _compression(source: Source, raw: io.BufferedReader[Any]) -> str:
    if source.kind not in ("stdin", "pipe"):
        return source.kind
    start = raw.peek(4)
    return "gz" if start[:2] == b"\x1f\x8b" else "zst" if start[:4] == b"\x28\xb5\x2f\xfd" else ""


@contextmanager
def open_source(source: Source, meter: Meter | None = None) -> Generator[BinaryIO]:
    """The decompressed bytes of an input; standard input and pipes are known by their content.

    Raises UserError for compressed data that is damaged or cut short. A file that is compressed in
    several frames one after another (``cat a.gz b.gz``) is read to its end.
    """
    handle = _raw(source)
    try:
        raw: io.BufferedReader[Any] = io.BufferedReader(_Metered(handle, meter or Meter()), 1 << 17)
        kind = _compression(source, raw)
        failures: tuple[type[Exception], ...] = ()
        stream: BinaryIO = raw
        if kind in ("gz", "zst"):
            if not raw.peek(1):
                raise UserError(
                    f"{source.name}: empty, so not {NAMES[kind]} data", "was it cut short?"
                )
            if kind == "gz":
                stream, failures = _gzip_reader(raw)
            else:
                opened: Any = zstd.ZstdFile(raw, "rb")
                stream, failures = cast(BinaryIO, opened), (zstd.ZstdError,)
        try:
            yield stream
        except (EOFError, *failures) as error:  # pyright: ignore[reportUnknownVariableType]
            raise UserError(
                f"{source.name}: damaged {NAMES[kind]} data: {error}",
                "fetch or make the file again",
            ) from error
    finally:
        if source.kind != "stdin":
            handle.close()


def skip_bytes(stream: BinaryIO, offset: int, source: Source) -> None:
    """Pass over what a stopped run has read already."""
    if source.kind == "plain" and stream.seekable():
        stream.seek(offset, os.SEEK_SET)
        return
    while offset > 0:
        chunk = stream.read(min(CHUNK, offset))
        if not chunk:
            raise UserError(f"{source.name}: shorter than when the run was stopped")
        offset -= len(chunk)
