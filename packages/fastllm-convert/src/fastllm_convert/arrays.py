"""Lazy arrays: where every element of a tensor lies in the source files, before any is read.

An ``Array`` is a box tiled by smaller boxes, each a strided view into a file (or a constant zero).
Slicing, concatenation, transposition and splitting or merging of axes rearrange boxes, so any
un-sharding, un-fusing and re-sharding of a weight is bookkeeping; bytes move once, at the end,
from the source file to their final place (``fastllm_convert.engine``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastllm_convert.dtypes import DType


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file that boxes point into. ``size`` in bytes, as it was when its header was checked."""

    path: Path
    size: int


class Box(NamedTuple):
    """``shape`` elements at ``start`` of the array, from ``file`` at byte ``offset``.

    ``strides`` are in bytes and may be 0 (a repeated row). ``file`` None: zeros.
    """

    start: tuple[int, ...]
    shape: tuple[int, ...]
    file: SourceFile | None
    offset: int
    strides: tuple[int, ...]


def contiguous_strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """C-order strides in bytes."""
    strides: list[int] = []
    step = itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class Array:
    """A tensor of ``shape`` and ``dtype`` whose ``boxes()`` tile it exactly, without overlap.

    Boxes are computed on demand and not kept: a plan of thousands of tensors stays small.
    """

    __slots__ = ("_boxes", "_unmerged", "dtype", "shape")

    def __init__(
        self,
        shape: Sequence[int],
        dtype: DType,
        boxes: Callable[[], Iterator[Box]],
        unmerged: Array | None = None,
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self._boxes = boxes
        self._unmerged = unmerged

    def __repr__(self) -> str:
        return f"Array({list(self.shape)}, {self.dtype.code})"

    def boxes(self) -> Iterator[Box]:
        return self._boxes()

    @property
    def compact(self) -> Array:
        """The same elements in the same order, before axes were merged: another shape, and often
        one strided box where this has one for every row."""
        return self if self._unmerged is None else self._unmerged

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def slice(self, axis: int, start: int, stop: int) -> Array:
        """Elements ``start`` ≤ i < ``stop`` along ``axis``."""
        if not 0 <= start <= stop <= self.shape[axis]:
            raise ValueError(f"slice [{start}:{stop}] of axis {axis} of {self!r}")
        if start == 0 and stop == self.shape[axis]:
            return self
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])

        def boxes() -> Iterator[Box]:
            for box in self._boxes():
                low = max(box.start[axis], start)
                high = min(box.start[axis] + box.shape[axis], stop)
                if low < high:
                    yield _cut(box, axis, low, high, shift=-start)

        return Array(shape, self.dtype, boxes, self._slice_unmerged(axis, start, stop))

    def _slice_unmerged(self, axis: int, start: int, stop: int) -> Array | None:
        """``slice`` of the unmerged form, where it cuts between elements of its first axis."""
        inner = self._unmerged
        if inner is None or axis != 0 or not inner.shape[0] or self.shape[0] % inner.shape[0]:
            return None
        rows = self.shape[0] // inner.shape[0]
        if start % rows or stop % rows:
            return None
        return inner.slice(0, start // rows, stop // rows)

    def transpose(self, *axes: int) -> Array:
        """numpy's ``transpose``: axis i of the result is axis ``axes[i]`` of this."""
        if sorted(axes) != list(range(len(self.shape))):
            raise ValueError(f"transpose{axes} of {self!r}")

        def boxes() -> Iterator[Box]:
            for box in self._boxes():
                yield Box(
                    tuple(box.start[a] for a in axes),
                    tuple(box.shape[a] for a in axes),
                    box.file,
                    box.offset,
                    tuple(box.strides[a] for a in axes),
                )

        return Array([self.shape[a] for a in axes], self.dtype, boxes)

    def split_axis(self, axis: int, outer: int, inner: int) -> Array:
        """Axis of size ``outer * inner`` → two axes."""
        if self.shape[axis] != outer * inner:
            raise ValueError(f"split axis {axis} of {self!r} into {outer} x {inner}")
        shape = (*self.shape[:axis], outer, inner, *self.shape[axis + 1 :])

        def boxes() -> Iterator[Box]:
            for box in self._boxes():
                for low, high in _aligned_runs(box.start[axis], box.shape[axis], inner):
                    yield _split(_cut(box, axis, low, high, shift=0), axis, inner)

        return Array(shape, self.dtype, boxes)

    def merge_axes(self, axis: int) -> Array:
        """Axes ``axis`` and ``axis + 1`` → one."""
        inner = self.shape[axis + 1]
        shape = (*self.shape[:axis], self.shape[axis] * inner, *self.shape[axis + 2 :])

        def boxes() -> Iterator[Box]:
            for box in self._boxes():
                yield from _merge(box, axis, inner)

        return Array(shape, self.dtype, boxes, self.compact)

    def reshape(self, *shape: int) -> Array:
        """C-order reshape: merge to one axis, split again (no-op when the shape is the same)."""
        if shape == self.shape:
            return self
        if math.prod(shape) != self.numel:
            raise ValueError(f"reshape {self!r} to {list(shape)}")
        flat = self
        while len(flat.shape) > 1:
            flat = flat.merge_axes(len(flat.shape) - 2)
        if not shape:
            return Array((), self.dtype, lambda: (_drop_axis(b) for b in flat.boxes()))
        if not flat.shape:
            base = flat
            flat = Array((1,), self.dtype, lambda: (_add_axis(b) for b in base.boxes()))
        for axis in range(len(shape) - 1):
            flat = flat.split_axis(axis, shape[axis], math.prod(shape[axis + 1 :]))
        return flat

    def repeat_first(self, count: int) -> Array:
        """``count`` copies of a one-row array along axis 0 (stride 0: nothing is stored twice)."""
        if self.shape[0] != 1:
            raise ValueError(f"repeat_first of {self!r}")

        def boxes() -> Iterator[Box]:
            for box in self._boxes():
                yield box._replace(shape=(count, *box.shape[1:]), strides=(0, *box.strides[1:]))

        return Array((count, *self.shape[1:]), self.dtype, boxes)


def from_file(
    file: SourceFile,
    offset: int,
    shape: Sequence[int],
    dtype: DType,
    strides: Sequence[int] | None = None,
) -> Array:
    """A strided view of one file, bounds already checked. ``offset`` and ``strides`` in bytes."""
    shape = tuple(shape)
    steps = contiguous_strides(shape, dtype.itemsize) if strides is None else tuple(strides)
    box = Box((0,) * len(shape), shape, file, offset, steps)
    return Array(shape, dtype, lambda: iter((box,) if math.prod(shape) else ()))


def zeros(shape: Sequence[int], dtype: DType) -> Array:
    """Constant zeros: no source."""
    shape = tuple(shape)
    box = Box((0,) * len(shape), shape, None, 0, (0,) * len(shape))
    return Array(shape, dtype, lambda: iter((box,) if math.prod(shape) else ()))


def concat(arrays: Sequence[Array], axis: int = 0) -> Array:
    """numpy's ``concatenate``; dtypes must be equal. Raises ``ValueError`` otherwise."""
    if len(arrays) == 1:
        return arrays[0]
    first = arrays[0]
    rest = (*first.shape[:axis], *first.shape[axis + 1 :])
    for other in arrays:
        if other.dtype != first.dtype:
            raise ValueError(f"parts of one tensor have types {first.dtype} and {other.dtype}")
        if (*other.shape[:axis], *other.shape[axis + 1 :]) != rest:
            raise ValueError(f"parts of one tensor have shapes {first.shape} and {other.shape}")
    total = sum(a.shape[axis] for a in arrays)
    parts = tuple(arrays)

    def boxes() -> Iterator[Box]:
        base = 0
        for part in parts:
            for box in part.boxes():
                start = (*box.start[:axis], box.start[axis] + base, *box.start[axis + 1 :])
                yield box._replace(start=start)
            base += part.shape[axis]

    return Array((*first.shape[:axis], total, *first.shape[axis + 1 :]), first.dtype, boxes)


def _cut(box: Box, axis: int, low: int, high: int, *, shift: int) -> Box:
    skipped = low - box.start[axis]
    return Box(
        (*box.start[:axis], low + shift, *box.start[axis + 1 :]),
        (*box.shape[:axis], high - low, *box.shape[axis + 1 :]),
        box.file,
        box.offset + skipped * box.strides[axis],
        box.strides,
    )


def _aligned_runs(start: int, count: int, inner: int) -> Iterator[tuple[int, int]]:
    """Cut [start, start+count) so that every run is whole rows of ``inner``, or within one row."""
    stop = start + count
    while start < stop:
        if start % inner == 0 and stop - start >= inner:
            end = stop - stop % inner
        else:
            end = min(stop, start - start % inner + inner)
        yield start, end
        start = end


def _split(box: Box, axis: int, inner: int) -> Box:
    start, count, step = box.start[axis], box.shape[axis], box.strides[axis]
    rows, columns = (count // inner, inner) if count >= inner else (1, count)
    return Box(
        (*box.start[:axis], start // inner, start % inner, *box.start[axis + 1 :]),
        (*box.shape[:axis], rows, columns, *box.shape[axis + 1 :]),
        box.file,
        box.offset,
        (*box.strides[:axis], inner * step, step, *box.strides[axis + 1 :]),
    )


def _merge(box: Box, axis: int, inner: int) -> Iterator[Box]:
    """One box when its rows follow each other at a constant step, else one box per row."""
    (row, column), (rows, columns) = box.start[axis : axis + 2], box.shape[axis : axis + 2]
    outer_step, step = box.strides[axis : axis + 2]
    head, tail = slice(0, axis), slice(axis + 2, None)

    def build(start: int, count: int, offset: int, stride: int) -> Box:
        return Box(
            (*box.start[head], start, *box.start[tail]),
            (*box.shape[head], count, *box.shape[tail]),
            box.file,
            offset,
            (*box.strides[head], stride, *box.strides[tail]),
        )

    if rows == 1:
        yield build(row * inner + column, columns, box.offset, step)
    elif columns == inner == 1:
        yield build(row, rows, box.offset, outer_step)
    elif columns == inner and outer_step == step * inner:
        yield build(row * inner, rows * inner, box.offset, step)
    else:
        for i in range(rows):
            start = (row + i) * inner + column
            yield build(start, columns, box.offset + i * outer_step, step)


def _drop_axis(box: Box) -> Box:
    return box._replace(start=(), shape=(), strides=())


def _add_axis(box: Box) -> Box:
    return box._replace(start=(0,), shape=(1,), strides=(0,))
