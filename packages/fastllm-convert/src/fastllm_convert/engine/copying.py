"""Moves the bytes of one task into an output file.

Runs that are contiguous on both sides are written straight from a mapping of the source: one copy
inside the kernel, at the speed of ``cp``. Everything else is gathered first (``gathering``), in
buffers of at most ``tasks.CHUNK`` bytes.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple

from fastllm_convert.engine.plan import Piece
from fastllm_convert.engine.sources import MAPPED, OpenSource, Sources
from fastllm_convert.engine.tasks import Run, Task
from fastllm_convert.files import crc32

_PAGE = 4096
_PART = 512 << 10
_ALIGNED_PART = 128 << 10


class Done(NamedTuple):
    """``crc``: CRC-32 of the bytes written, when wanted. ``overflowed``: finite → infinite."""

    crc: int = 0
    overflowed: int = 0


class Output:
    """A file being written. One thread writes at a time: two would only spin on the kernel's inode
    lock, while the other can gather or checksum meanwhile."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.lock = threading.Lock()


def run_task(task: Task, piece: Piece, sources: Sources, out: Output, *, want_crc: bool) -> Done:
    """Move the bytes of one task."""
    if isinstance(task, Run):
        return Done(_run_range(task, sources, out, want_crc=want_crc))
    from fastllm_convert.engine.gathering import window_bytes  # numpy: only where it is needed

    found = window_bytes(task, piece.array, piece.dtype, sources)
    if found is None:
        return Done(crc32.of_zeros(task.nbytes) if want_crc else 0)
    view, overflowed = found
    crc = crc32.of(view) if want_crc else 0
    with out.lock:
        write_all(out.fd, view, task.offset)
    return Done(crc, overflowed)


def _run_range(run: Run, sources: Sources, out: Output, *, want_crc: bool) -> int:
    if run.source is None:
        return crc32.of_zeros(run.nbytes) if want_crc else 0
    source = sources[run.source]
    crc, at, stop = 0, run.start, run.start + run.nbytes
    for begin, end in source.data_ranges(run.start, stop):
        if want_crc and begin > at:
            crc = crc32.combine(crc, crc32.of_zeros(begin - at), begin - at)
        offset = run.offset + begin - run.start
        crc = copy_mapped(source, begin, end, out, offset, crc if want_crc else None)
        at = end
    if want_crc and at < stop:
        crc = crc32.combine(crc, crc32.of_zeros(stop - at), stop - at)
    return crc


def copy_mapped(
    source: OpenSource, begin: int, end: int, out: Output, offset: int, crc: int | None
) -> int:
    """Write from the mapped source, a few megabytes mapped at a time; the CRC goes along.

    Only the write needs the file's lock: another thread writes while this one checksums.
    """
    total = crc or 0
    for start in range(begin, end, MAPPED):
        with source.mapped(start, min(start + MAPPED, end)) as view:
            if crc is not None:
                total = crc32.of(view, total)
            with out.lock:
                write_all(out.fd, view, offset + start - begin)
    return total


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """pwrite until everything is written, in parts.

    A large page-aligned write makes the kernel allocate large folios, which costs several times the
    copy where fresh ones must be found (docs/convert.md, "Measurements"); small parts reuse pages.
    """
    part = _ALIGNED_PART if offset % _PAGE == 0 else _PART
    at, end = 0, len(view)
    while at < end:
        at += os.pwrite(fd, view[at : at + part], offset + at)
