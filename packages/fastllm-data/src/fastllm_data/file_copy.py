"""Copy bytes between files without reading them into the process, where the system can."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import BinaryIO

BUFFER = 1 << 20


def append_range(path: Path, out: BinaryIO, begin: int, size: int) -> None:
    """Append ``size`` bytes of a file from ``begin`` on to ``out``.

    By copy_file_range, which shares blocks instead of copying where the file system can (btrfs,
    xfs, nfs 4.2). Raises OSError.
    """
    out.flush()
    with path.open("rb") as file:
        at, end = begin, begin + size
        # Where the file systems cannot do this, the bytes that are left go through this process.
        with contextlib.suppress(OSError):
            while at < end:
                copied = os.copy_file_range(file.fileno(), out.fileno(), end - at, at)
                if copied == 0:
                    break
                at += copied
        file.seek(at)
        out.seek(0, os.SEEK_END)
        while at < end:
            block = file.read(min(BUFFER, end - at))
            if not block:
                raise OSError(f"{path}: shorter than it was")
            out.write(block)
            at += len(block)
