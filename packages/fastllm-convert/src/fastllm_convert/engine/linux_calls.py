"""Calls of Linux that Python does not offer. Where they are missing, nothing is lost but time.

``sync_file_range`` starts writing to disk early: fsync at the end of a large file waits for all of
its dirty pages, and asking the kernel to begin with each part as it is copied overlaps the two.
``fallocate`` reserves a file's blocks at once, which is a tenth faster than one write at a time and
finds a full disk before anything is copied (``os.posix_fallocate`` would write zeros to every block
on file systems that cannot reserve). ``mapped`` is ``mmap`` without holding Python's lock while the
kernel maps a few thousand pages: another thread copies meanwhile.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

_WRITE = 2  # SYNC_FILE_RANGE_WRITE: start, do not wait (linux/fs.h)
_CANNOT = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV)


@cache
def _function(name: str, *types: Any, result: Any = ctypes.c_int) -> Any:
    """The C function, or None where the C library has none (not Linux)."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes = types
        function.restype = result
    return function


def start_writing(fd: int, offset: int, nbytes: int) -> None:
    """Begin to write bytes [offset, offset + nbytes) of ``fd``. Errors show up in fsync."""
    types = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    function = _function("sync_file_range", *types)
    if function is not None:
        function(fd, offset, nbytes, _WRITE)


def reserve(fd: int, nbytes: int) -> None:
    """Blocks for the first ``nbytes`` of ``fd``. Raises ``OSError`` (a full disk) and nothing else:
    a file system that cannot reserve is left as it is."""
    types = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    function = _function("fallocate", *types)
    if function is None or nbytes == 0:
        return
    if function(fd, 0, 0, nbytes) != 0:
        code = ctypes.get_errno()
        if code not in _CANNOT:
            raise OSError(code, os.strerror(code))


@contextmanager
def mapped(fd: int, start: int, stop: int) -> Generator[memoryview]:
    """Bytes [start, stop) of ``fd``, all pages present; no slice of the view may outlive the
    ``with``. Raises ``OSError``; bytes past the end of the file fault when they are read."""
    base = start - start % mmap.ALLOCATIONGRANULARITY
    length = stop - base
    populate = getattr(mmap, "MAP_POPULATE", 0)
    ints = (ctypes.c_int,) * 3
    call = _function(
        "mmap", ctypes.c_void_p, ctypes.c_size_t, *ints, ctypes.c_int64, result=ctypes.c_void_p
    )
    unmap = _function("munmap", ctypes.c_void_p, ctypes.c_size_t)
    address = call(None, length, mmap.PROT_READ, mmap.MAP_SHARED | populate, fd, base)
    if address in (None, ctypes.c_void_p(-1).value):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    whole = memoryview((ctypes.c_ubyte * length).from_address(address)).cast("B")
    view = whole[start - base :].toreadonly()
    try:
        yield view
    finally:
        view.release()
        whole.release()  # BufferError, and no unmapping, when somebody still holds a slice
        unmap(address, length)
