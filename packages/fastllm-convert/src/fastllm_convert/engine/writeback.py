"""Start writing to disk early: ``sync_file_range``, which Python's ``os`` does not offer.

fsync at the end of a large file waits for all of its dirty pages. Asking the kernel to begin with
each part as it is copied overlaps the disk with the copying. A hint only: fsync still decides.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

_WRITE = 2  # SYNC_FILE_RANGE_WRITE: start, do not wait (linux/fs.h)


@cache
def _function() -> Any:
    """The C function, or None where the C library has none (not Linux)."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        function.restype = ctypes.c_int
    return function


def start(fd: int, offset: int, nbytes: int) -> None:
    """Begin writing bytes [offset, offset + nbytes) of ``fd``. Errors show up in fsync."""
    function = _function()
    if function is not None:
        function(fd, offset, nbytes, _WRITE)
