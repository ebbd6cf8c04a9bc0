"""Open source files: descriptors and read-only mappings, shared by the copying threads."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastllm_convert.arrays import SourceFile
from fastllm_convert.errors import UserError


class OpenSource:
    """``fd`` for the kernel to copy from, ``bytes`` (mapped on first use) for strided reads."""

    def __init__(self, file: SourceFile) -> None:
        try:
            self.fd = os.open(file.path, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"cannot read {file.path}: {error.strerror}") from None
        stat = os.fstat(self.fd)
        if stat.st_size != file.size:
            os.close(self.fd)
            raise UserError(f"{file.path} changed while it was being read")
        self.path = file.path
        self.size = file.size
        self.sparse = stat.st_blocks * 512 < stat.st_size
        self._lock = threading.Lock()
        self._bytes: npt.NDArray[np.uint8] | None = None
        self._map: mmap.mmap | None = None

    @property
    def bytes(self) -> npt.NDArray[np.uint8]:
        with self._lock:
            if self._bytes is None:
                self._map = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
                self._bytes = np.frombuffer(self._map, np.uint8)
            return self._bytes

    def data_ranges(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The parts of [start, stop) that are not holes of a sparse file."""
        if not self.sparse:
            yield start, stop
            return
        while start < stop:
            try:
                begin = os.lseek(self.fd, start, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole until the end
                    return
                yield start, stop
                return
            if begin >= stop:
                return
            end = min(os.lseek(self.fd, begin, os.SEEK_HOLE), stop)
            yield begin, end
            start = end

    def has_data(self, start: int, stop: int) -> bool:
        return next(self.data_ranges(start, stop), None) is not None

    def release(self) -> None:
        """Drop mapped pages: they stay in the page cache but leave our resident set."""
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        os.close(self.fd)
        self._bytes = None
        if self._map is not None:
            self._map.close()
            self._map = None


class Sources:
    """Every source is opened once. A context manager; safe to use from several threads."""

    def __init__(self) -> None:
        self._open: dict[Path, OpenSource] = {}
        self._lock = threading.Lock()

    def __getitem__(self, file: SourceFile) -> OpenSource:
        with self._lock:
            found = self._open.get(file.path)
            if found is None:
                found = self._open[file.path] = OpenSource(file)
            return found

    def __enter__(self) -> Sources:
        return self

    def __exit__(self, *_: object) -> None:
        for source in self._open.values():
            source.close()
        self._open.clear()
