"""From one array to the work it is: contiguous runs, and windows whose elements must be gathered.

Plain arithmetic on boxes. Nothing is opened here, and numpy is not needed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fastllm_convert.arrays import Array, Box, SourceFile, contiguous_strides
from fastllm_convert.dtypes import DType
from fastllm_convert.engine.plan import Piece

# Two megabytes of gathered elements (and as many of cast ones) stay in a processor's own cache.
CHUNK = 2 << 20
RUN_CHUNK = 64 << 20
# Below this mean run length a gather (one memcpy per run, few writes) beats a system call per run:
# 64 KB at 3 GB/s is 20 us, about ten times what the call costs.
MIN_RUN = 64 << 10
FEW = 4  # norms and biases: so few calls that loading numpy would cost more


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
    if piece.dtype == piece.array.dtype:
        runs = flat_runs(piece.array)
        if runs is not None and (
            len(runs) <= FEW or sum(r.nbytes for r in runs) >= MIN_RUN * len(runs)
        ):
            return [cut for run in runs for cut in _cut(run, piece.offset)]
    return list(windows(piece.array.compact, piece.dtype, piece.offset))


def flat_runs(array: Array) -> list[Run] | None:
    """The boxes as contiguous runs, neighbours joined; None when some box is strided."""
    item = array.dtype.itemsize
    steps = contiguous_strides(array.shape, item)
    found: list[Run] = []
    for box in array.boxes():
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
    for at in range(0, run.nbytes, RUN_CHUNK):
        count = min(RUN_CHUNK, run.nbytes - at)
        yield Run(base + run.offset + at, count, run.source, run.start + at)


def windows(array: Array, dtype: DType, offset: int = 0, *, widest: int = 0) -> Iterator[Window]:
    """Cut into parts of at most ``CHUNK`` bytes along the outermost axes that allow it; the first
    begins at byte ``offset`` of an output that stores ``dtype``.

    ``widest``: bytes per element to reckon with, when that of both types is not enough.
    """
    shape, boxes = array.shape, list(array.boxes())
    item = max(dtype.itemsize, array.dtype.itemsize, widest)
    axis = 0
    while axis < len(shape) - 1 and math.prod(shape[axis + 1 :]) * item > CHUNK:
        axis += 1
    inner = math.prod(shape[axis + 1 :])
    rows = max(1, CHUNK // max(1, inner * item))
    for prefix in itertools.product(*map(range, shape[:axis])):
        for low in range(0, shape[axis] if shape else 1, rows):
            count = min(rows, shape[axis] - low) if shape else 1
            start = (*prefix, low, *([0] * (len(shape) - axis - 1))) if shape else ()
            size = (*([1] * axis), count, *shape[axis + 1 :]) if shape else ()
            inside = tuple(b for b in boxes if _overlaps(b, start, size))
            nbytes = math.prod(size) * dtype.itemsize
            yield Window(offset, nbytes, start, size, inside)
            offset += nbytes


def _overlaps(box: Box, start: Sequence[int], size: Sequence[int]) -> bool:
    return all(
        b < s + n and s < b + m
        for b, m, s, n in zip(box.start, box.shape, start, size, strict=True)
    )
