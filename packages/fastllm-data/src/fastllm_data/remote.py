"""Inputs behind URLs (http, s3, gs, …), through fsspec: the extra ``fastllm-data[remote]``."""

from __future__ import annotations

import errno
import importlib
import io
import re
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from fastllm_data.errors import UserError

BLOCK = 8 << 20  # bytes asked for at a time: a request costs tens of milliseconds
NEEDS = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
URL = re.compile(r"[a-z][a-z0-9+.-]+(::[^:]*)?://")


@dataclass(frozen=True)
class RemoteFile:
    """``size``: bytes, 0 if the server does not say. ``version``: its ETag or the like."""

    url: str
    size: int
    version: str


def is_url(name: str) -> bool:
    return URL.match(name) is not None


def _filesystem(url: str) -> tuple[Any, str]:
    try:
        return importlib.import_module("fsspec.core").url_to_fs(url)
    except ImportError as error:
        scheme = url.split(":", 1)[0]
        needed = NEEDS.get(scheme)
        extra = f" {needed}" if needed and scheme not in ("http", "https") else ""
        raise UserError(f"{url}: {error}", f"pip install 'fastllm-data[remote]'{extra}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error


def expand(url: str) -> list[RemoteFile]:
    """The file that a URL names, or those that a pattern matches, by name. Raises UserError."""
    files, path = _filesystem(url)
    try:
        pattern = "*" in path or ("?" in path and not url.startswith("http"))
        paths = sorted(files.glob(path)) if pattern else [path]
        found: list[RemoteFile] = []
        for one in paths:
            info: dict[str, Any] = files.info(one)
            if info.get("type") == "directory":
                raise UserError(f"{url}: is a folder", f"name its files: '{url}/*.jsonl'")
            version = info.get("ETag") or info.get("etag") or info.get("mtime") or ""
            name = str(files.unstrip_protocol(one))
            found.append(RemoteFile(name, int(info.get("size") or 0), str(version)))
    except UserError:
        raise
    except Exception as error:  # each protocol's library has errors of its own
        raise UserError(f"{url}: cannot be read: {_reason(error)}") from error
    if not found:
        raise UserError(f"{url}: no such file")
    return found


def open_url(url: str, size: int) -> BinaryIO:
    """The bytes of a remote file; a connection that breaks is an OSError, never a short file."""
    files, path = _filesystem(url)
    try:
        stream: BinaryIO = files.open(path, "rb", block_size=BLOCK, cache_type="readahead")
    except Exception as error:
        raise OSError(errno.EIO, f"cannot be read: {_reason(error)}", url) from error
    return cast(BinaryIO, io.BufferedReader(_Checked(stream, url, size), 1 << 20))


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


class _Checked(io.RawIOBase):
    """Passes a remote stream on; what goes wrong with it, or is missing at its end, is an error."""

    def __init__(self, stream: BinaryIO, url: str, size: int) -> None:
        self._stream = stream
        self._url = url
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = self._stream.seek(offset, whence)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._stream.read(len(buffer))
        except Exception as error:
            raise OSError(errno.EIO, f"reading stopped: {_reason(error)}", self._url) from error
        if not data and self._size and self._at < self._size:
            said = f"ended after {self._at} of {self._size} bytes"
            raise OSError(errno.EIO, said, self._url)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
