"""Open source files: descriptors and read-only mappings, shared by the copying threads."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastllm_convert.arrays import SourceFile
from fastllm_convert.engine import linux_calls
from fastllm_convert.errors import UserError

# Page tables of what was touched are kept until a mapping goes: 2 MB for every GB.
_WHOLE_LIMIT = 4 << 30


class OpenSource:
    """``mapped`` for contiguous ranges, ``whole`` for strided reads."""

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
        self._whole: mmap.mmap | None = None
        self._used = 0

    @contextmanager
    def mapped(self, start: int, stop: int) -> Generator[memoryview]:
        """Bytes [start, stop) as a view, for the time of the ``with``."""
        if os.fstat(self.fd).st_size < stop:
            raise self._changed()
        try:
            with linux_calls.mapped(self.fd, start, stop) as view:
                yield view
        except OSError as error:
            if error.errno == errno.EFAULT:  # the kernel read past the end of the file
                raise self._changed() from None
            raise

    def _changed(self) -> UserError:
        return UserError(f"{self.path} became shorter while it was being read")

    def whole(self, nbytes: int) -> Any:
        """A mapping of the whole file, of which the caller is going to read ``nbytes``.

        Replaced from time to time (the old one goes with its last view), so that page tables do not
        grow with the model.
        """
        with self._lock:
            self._used += nbytes
            if self._whole is None or self._used > _WHOLE_LIMIT:
                self._whole = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
                self._used = nbytes
            return self._whole

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

    def close(self) -> None:
        os.close(self.fd)
        self._whole = None


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
