"""From one array to its bytes in an output file, cut into tasks of bounded size.

Runs that are contiguous on both sides go through ``copy_file_range`` (the kernel copies between
page caches) when their pages line up, else through a small buffer. Everything else (rotary
permutation, column shards, transposition, a cast) is gathered with numpy into a buffer of at most
``CHUNK`` bytes and written with one ``pwrite``.
"""

from __future__ import annotations

import errno
import math
import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fastllm_convert.arrays import Array, Box, SourceFile, contiguous_strides
from fastllm_convert.dtypes import DType, numpy_float, raw_numpy
from fastllm_convert.engine.plan import Piece
from fastllm_convert.engine.sources import OpenSource, Sources
from fastllm_convert.errors import UserError
from fastllm_convert.files import crc32

CHUNK = 4 << 20
KERNEL_CHUNK = 64 << 20
_COPY = 512 << 10
_PAGE = 4096
_ALIGNED_WRITE = 64 << 10
# Below this mean run length a gather (one memcpy per run, one write per 8 MB) beats a system call
# per run: 64 KB at 3 GB/s is 20 us, about ten times what the call costs.
MIN_RUN = 64 << 10


class Run(NamedTuple):
    """``nbytes`` from ``source`` (None: zeros) at ``start`` to byte ``offset`` of the output."""

    offset: int
    nbytes: int
    source: SourceFile | None
    start: int


class Window(NamedTuple):
    """The elements of a box of the array, contiguous in the output from byte ``offset`` on."""

    offset: int
    nbytes: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


Task = Run | Window


def tasks(piece: Piece) -> list[Task]:
    """The work of one piece, in the order of its bytes."""
    boxes = list(piece.array.boxes())
    if piece.dtype == piece.array.dtype:
        runs = _runs(piece.array, boxes)
        if runs is not None and sum(r.nbytes for r in runs) >= MIN_RUN * len(runs):
            return [cut for run in runs for cut in _cut(run, piece.offset)]
    return list(windows(piece, boxes))


def _runs(array: Array, boxes: Sequence[Box]) -> list[Run] | None:
    """The boxes as contiguous runs, neighbours joined; None when some box is strided."""
    item = array.dtype.itemsize
    steps = contiguous_strides(array.shape, item)
    found: list[Run] = []
    for box in boxes:
        if not _is_flat(box, array.shape, item):
            return None
        offset = sum(s * step for s, step in zip(box.start, steps, strict=True))
        found.append(Run(offset, math.prod(box.shape) * item, box.file, box.offset))
    found.sort(key=lambda run: run.offset)
    joined: list[Run] = []
    for run in found:
        last = joined[-1] if joined else None
        if (
            last is not None
            and last.source is run.source
            and (run.source is None or last.start + last.nbytes == run.start)
        ):
            joined[-1] = last._replace(nbytes=last.nbytes + run.nbytes)
        else:
            joined.append(run)
    return joined


def _is_flat(box: Box, shape: Sequence[int], item: int) -> bool:
    """Contiguous in the array (full trailing axes) and in its file."""
    partial = False  # an axis that is not full may only be preceded by axes of one element
    step = item
    for size, full, stride in zip(
        reversed(box.shape), reversed(shape), reversed(box.strides), strict=True
    ):
        if partial and size > 1:
            return False
        if size > 1 and box.file is not None and stride != step:
            return False
        partial = partial or size != full
        step *= size
    return True


def _cut(run: Run, base: int) -> Iterator[Run]:
    for at in range(0, run.nbytes, KERNEL_CHUNK):
        count = min(KERNEL_CHUNK, run.nbytes - at)
        yield Run(base + run.offset + at, count, run.source, run.start + at)


def windows(piece: Piece, boxes: Sequence[Box], *, widest: int = 0) -> Iterator[Window]:
    """Cut into parts of at most ``CHUNK`` bytes along the outermost axes that allow it.

    ``widest``: bytes per element to reckon with, when that of both types is not enough.
    """
    shape = piece.array.shape
    item = max(piece.dtype.itemsize, piece.array.dtype.itemsize, widest)
    axis = 0
    while axis < len(shape) - 1 and math.prod(shape[axis + 1 :]) * item > CHUNK:
        axis += 1
    inner = math.prod(shape[axis + 1 :])
    rows = max(1, CHUNK // max(1, inner * item))
    offset = piece.offset
    for prefix in np.ndindex(*shape[:axis]):
        for low in range(0, shape[axis] if shape else 1, rows):
            count = min(rows, shape[axis] - low) if shape else 1
            start = (*prefix, low, *([0] * (len(shape) - axis - 1))) if shape else ()
            size = (*([1] * axis), count, *shape[axis + 1 :]) if shape else ()
            inside = tuple(b for b in boxes if _overlaps(b, start, size))
            nbytes = math.prod(size) * piece.dtype.itemsize
            yield Window(offset, nbytes, start, size, inside)
            offset += nbytes


def _overlaps(box: Box, start: Sequence[int], size: Sequence[int]) -> bool:
    return all(
        b < s + n and s < b + m
        for b, m, s, n in zip(box.start, box.shape, start, size, strict=True)
    )


class _Scratch(threading.local):
    """Per-thread buffers that are kept: fresh ones cost a page fault per 4 KB of every chunk."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[np.uint8]] = {}

    def get(self, use: str, shape: Sequence[int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        nbytes = math.prod(shape) * dtype.itemsize
        held = self._held.get(use)
        if held is None or held.size < nbytes:
            held = self._held[use] = np.empty(max(nbytes, CHUNK), np.uint8)
        return held[:nbytes].view(dtype).reshape(shape)


_scratch = _Scratch()


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
    buffer = gather(task, piece.array.dtype, sources)
    if buffer is None:
        return Done(crc32.of_zeros(task.nbytes) if want_crc else 0)
    overflowed = 0
    if piece.dtype != piece.array.dtype:
        buffer, overflowed = cast(buffer, piece.array.dtype, piece.dtype)
    view = buffer.reshape(-1).view(np.uint8).data
    crc = zlib.crc32(view) if want_crc else 0
    with out.lock:
        write_all(out.fd, view, task.offset)
    return Done(crc, overflowed)


def _run_range(run: Run, sources: Sources, out: Output, *, want_crc: bool) -> int:
    crc = 0
    if run.source is None:
        return crc32.of_zeros(run.nbytes) if want_crc else 0
    source = sources[run.source]
    at = run.start
    for begin, end in source.data_ranges(run.start, run.start + run.nbytes):
        if want_crc and begin > at:
            crc = crc32.combine(crc, crc32.of_zeros(begin - at), begin - at)
        offset = run.offset + begin - run.start
        if want_crc or (begin - offset) % _PAGE:
            crc = copy_buffered(source, begin, end, out, offset, crc if want_crc else None)
        else:
            copy_range(source, begin, end, out, offset)
        at = end
    stop = run.start + run.nbytes
    if want_crc and at < stop:
        crc = crc32.combine(crc, crc32.of_zeros(stop - at), stop - at)
    return crc


def copy_buffered(
    source: OpenSource, begin: int, end: int, out: Output, offset: int, crc: int | None
) -> int:
    """Read and write through a buffer that stays in the processor's cache.

    Faster than the kernel's copy when the two files' pages do not line up (every page would be
    copied in two parts), and the place to compute a CRC. Only the write needs the file's lock.
    """
    view = _scratch.get("copy", (_COPY,), np.dtype(np.uint8)).data
    total = crc or 0
    while begin < end:
        done = os.preadv(source.fd, [view[: min(_COPY, end - begin)]], begin)
        if done == 0:
            raise UserError(f"{source.path} became shorter while it was being read")
        if crc is not None:
            total = zlib.crc32(view[:done], total)
        with out.lock:
            write_all(out.fd, view[:done], offset)
        begin, offset = begin + done, offset + done
    return total


def copy_range(source: OpenSource, begin: int, end: int, out: Output, offset: int) -> None:
    """Kernel-side copy, falling back to the buffer where the file systems cannot."""
    while begin < end:
        try:
            with out.lock:
                done = os.copy_file_range(source.fd, out.fd, end - begin, begin, offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            copy_buffered(source, begin, end, out, offset, None)
            return
        if done == 0:
            raise UserError(f"{source.path} became shorter while it was being read")
        begin, offset = begin + done, offset + done


def write_all(fd: int, view: memoryview, offset: int) -> None:
    """pwrite until everything is written, in parts.

    A large page-aligned write makes the kernel allocate large folios, which costs three times the
    copy where fresh ones must be found (docs/convert.md, "Speed"); small parts reuse pages.
    """
    part = _ALIGNED_WRITE if offset % _PAGE == 0 else _COPY
    while view:
        done = os.pwrite(fd, view[:part], offset)
        view, offset = view[done:], offset + done


def gather(window: Window, dtype: DType, sources: Sources) -> npt.NDArray[Any] | None:
    """The window's elements as one C-ordered buffer. None: nothing but zeros (holes, padding).

    The buffer is this thread's own and is used again by its next gather.
    """
    raw = raw_numpy(dtype)
    buffer = _scratch.get("gather", window.shape, raw)
    empty = True
    for box in window.boxes:
        low = tuple(max(b, s) for b, s in zip(box.start, window.start, strict=True))
        high = tuple(
            min(b + m, s + n)
            for b, m, s, n in zip(box.start, box.shape, window.start, window.shape, strict=True)
        )
        place = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, window.start, strict=True))
        view = _view(box, low, high, raw, sources)
        if view is None:
            buffer[place] = 0
        else:
            buffer[place] = view
            empty = False
    return None if empty else buffer


def _view(
    box: Box,
    low: Sequence[int],
    high: Sequence[int],
    raw: np.dtype[Any],
    sources: Sources,
) -> npt.NDArray[Any] | None:
    if box.file is None:
        return None
    source = sources[box.file]
    shape = tuple(b - a for a, b in zip(low, high, strict=True))
    offset = box.offset + sum(
        (a - b) * step for a, b, step in zip(low, box.start, box.strides, strict=True)
    )
    last = offset + sum((n - 1) * step for n, step in zip(shape, box.strides, strict=True))
    if source.sparse and not source.has_data(offset, last + raw.itemsize):
        return None
    if last + raw.itemsize > source.size:  # as_strided checks nothing itself
        raise UserError(f"{source.path}: a tensor reaches past the end of the file")
    # A view of unaligned bytes: numpy copies such arrays correctly, at memcpy speed for rows.
    return np.ndarray(shape, raw, buffer=source.bytes.data, offset=offset, strides=box.strides)


def cast(buffer: npt.NDArray[Any], source: DType, target: DType) -> tuple[npt.NDArray[Any], int]:
    """Round to nearest, ties to even (IEEE 754; numpy's and ml_dtypes' conversion).

    Also returns how many finite values became infinite.
    """
    if not (source.floating and target.floating):
        raise UserError(f"cannot cast {source.code} to {target.code}")
    if source.code == "BF16" and target.code == "F32":
        # bfloat16 is the upper half of a float32: widening is a shift, and exact.
        wide = _scratch.get("cast", buffer.shape, np.dtype(np.uint32))
        return np.left_shift(buffer, np.uint32(16), out=wide, dtype=np.uint32), 0
    values = buffer.view(numpy_float(source))
    result = _scratch.get("cast", buffer.shape, numpy_float(target))
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(result, values, casting="unsafe")
    overflowed = 0
    if _RANGE[target.code] < _RANGE[source.code]:
        overflowed = int(np.count_nonzero(~np.isfinite(result)))
        if overflowed:
            overflowed -= int(np.count_nonzero(~np.isfinite(values)))
    return result.view(raw_numpy(target)), overflowed


# Exponents of the largest finite value: which casts can overflow.
_RANGE = {"F64": 1023, "F32": 127, "BF16": 126, "F16": 15, "F8_E5M2": 15, "F8_E4M3": 8}
