"""Moves the bytes of one task into an output file.

Runs that are contiguous on both sides are copied once, by the kernel: ``copy_file_range`` where the
pages of both files line up, else a write straight from a mapping of the source. Everything else is
gathered first (``gathering``), in buffers of at most ``tasks.CHUNK`` bytes.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from typing import NamedTuple

from fastllm_convert.engine.plan import Piece
from fastllm_convert.engine.sources import OpenSource, Sources
from fastllm_convert.engine.tasks import Run, Task
from fastllm_convert.files import crc32

_PAGE = 4096
_STEP = 4 << 20
_NO_KERNEL_COPY = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


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
        if want_crc or (begin - offset) % _PAGE:
            crc = copy_mapped(source, begin, end, out, offset, crc if want_crc else None)
        else:
            copy_range(source, begin, end, out, offset)
        at = end
    if want_crc and at < stop:
        crc = crc32.combine(crc, crc32.of_zeros(stop - at), stop - at)
    return crc


def copy_mapped(
    source: OpenSource, begin: int, end: int, out: Output, offset: int, crc: int | None
) -> int:
    """Write from the mapped source; the CRC goes along.

    Only the write needs the file's lock: another thread writes while this one checksums.
    """
    total = crc or 0
    with source.mapped(begin, end) as view:
        for at in range(0, end - begin, _STEP):
            with view[at : at + _STEP] as step:
                if crc is not None:
                    total = crc32.of(step, total)
                with out.lock:
                    write_all(out.fd, step, offset + at)
    return total


def copy_range(source: OpenSource, begin: int, end: int, out: Output, offset: int) -> None:
    """The kernel's own copy, page by page: as fast as it gets where the pages of both line up."""
    while begin < end:
        with out.lock:
            try:
                done = os.copy_file_range(source.fd, out.fd, end - begin, begin, offset)
            except OSError as error:
                if error.errno not in _NO_KERNEL_COPY:
                    raise
                done = 0
        if done == 0:  # another file system, or a file that became shorter: mapping it tells
            copy_mapped(source, begin, end, out, offset, None)
            return
        begin, offset = begin + done, offset + done


class PartSize:
    """How many bytes one pwrite gets: 32 or 128 KB, whichever has been faster.

    Larger writes make the kernel allocate larger folios. Where memory for them lies ready that is
    up to a third faster; where it must be found first, two to three times slower, and a machine
    goes from one state to the other (docs/convert.md, "Measurements"). So one write in sixteen is
    done with the other size, and the better one is used for the rest.
    """

    SIZES = (32 << 10, 128 << 10)
    _EVERY = 16
    _LEAST = 1 << 20  # shorter writes say nothing

    def __init__(self) -> None:
        self._cost = [0.0, 0.0]  # seconds per byte, a moving average; 0: not yet known
        self._count = 0

    def choose(self, nbytes: int) -> int:
        """Index of the size to use for a write of ``nbytes``."""
        first, second = self._cost
        best = 1 if second < first else 0
        if nbytes < self._LEAST:
            return best
        self._count += 1
        return 1 - best if self._count % self._EVERY == 1 else best

    def learn(self, index: int, nbytes: int, seconds: float) -> None:
        if nbytes >= self._LEAST:
            known, cost = self._cost[index], seconds / nbytes
            self._cost[index] = cost if known == 0 else 0.7 * known + 0.3 * cost


_part_size = PartSize()


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """pwrite until everything is written, in parts that end at multiples of their size in the file:
    within a page that a part ends in, the kernel works twice."""
    end = len(view)
    index = _part_size.choose(end)
    size = PartSize.SIZES[index]
    started, at = time.perf_counter(), 0
    while at < end:
        room = size - (offset + at) % size
        at += os.pwrite(fd, view[at : at + room], offset + at)
    _part_size.learn(index, end, time.perf_counter() - started)
