"""Before anything is written: CRCs of the zip members to be read, tensors that must agree."""

from __future__ import annotations

import os
import threading
import zlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastllm_convert.arrays import Array, SourceFile
from fastllm_convert.dtypes import DType, numpy_float, raw_numpy
from fastllm_convert.engine.copying import Window, cast, gather, windows
from fastllm_convert.engine.plan import Piece
from fastllm_convert.engine.sources import Sources
from fastllm_convert.errors import UserError
from fastllm_convert.files import crc32
from fastllm_convert.files.torch_zip import Member

_PART = 32 << 20
_SMALL = 64 << 10  # pickles, byteorder, version: checked whether or not a tensor lies there


def _part_crc(source: SourceFile, start: int, stop: int, sources: Sources) -> tuple[int, int]:
    opened = sources[source]
    buffer = bytearray(min(1 << 20, stop - start))
    view = memoryview(buffer)
    crc, at = 0, start
    for begin, end in opened.data_ranges(start, stop):
        if begin > at:
            crc = crc32.combine(crc, crc32.of_zeros(begin - at), begin - at)
        while begin < end:
            count = os.preadv(opened.fd, [view[: min(len(buffer), end - begin)]], begin)
            if count == 0:
                raise UserError(f"{source.path} became shorter while it was being read")
            crc = zlib.crc32(view[:count], crc)
            begin += count
        at = end
    if at < stop:
        crc = crc32.combine(crc, crc32.of_zeros(stop - at), stop - at)
    return crc, stop - start


class MemberCheck:
    """CRC-32 of one zip member, in parts that any thread may compute."""

    def __init__(self, file: SourceFile, member: Member, sources: Sources) -> None:
        self.file, self.member, self.sources = file, member, sources
        starts = range(member.offset, member.offset + member.size, _PART)
        self._parts: list[tuple[int, int] | None] = [None] * len(starts)
        self._lock = threading.Lock()
        self.jobs = [self._job(i, start) for i, start in enumerate(starts)]

    def _job(self, index: int, start: int) -> Callable[[], int]:
        stop = min(start + _PART, self.member.offset + self.member.size)

        def run() -> int:
            part = _part_crc(self.file, start, stop, self.sources)
            with self._lock:
                self._parts[index] = part
                if None not in self._parts:
                    self._compare()
            return 0

        return run

    def _compare(self) -> None:
        total = 0
        for part in self._parts:
            total = crc32.combine(total, *part) if part else total
        if total != self.member.crc:
            raise UserError(
                f"{self.file.path}: CRC-32 mismatch at byte {self.member.offset}: "
                "the file is damaged",
                hint="if it was saved without CRCs (torch set_crc32_options), pass --no-crc",
            )


def member_checks(
    checked: Sequence[tuple[SourceFile, Member]], arrays: Iterable[Array], sources: Sources
) -> list[Callable[[], int]]:
    """Jobs that check the members which ``arrays`` read, and the pickles and directories' own.

    A job raises ``UserError`` for a CRC that does not hold. Members that nobody reads (optimizer
    moments) are left alone.
    """
    starts: dict[Path, list[int]] = {}
    for array in arrays:
        for box in array.boxes():
            if box.file is not None:
                starts.setdefault(box.file.path, []).append(box.offset)
    for offsets in starts.values():
        offsets.sort()
    jobs: list[Callable[[], int]] = []
    for file, member in checked:
        offsets = starts.get(file.path, [])
        at = bisect_left(offsets, member.offset)
        used = at < len(offsets) and offsets[at] < member.offset + member.size
        if used or member.size < _SMALL:
            jobs += MemberCheck(file, member, sources).jobs
    return jobs


def first_difference(
    a: Array, b: Array, sources: Sources, dtype: DType | None = None
) -> float | None:
    """None when equal bit for bit; else the largest absolute difference (inf when types differ)."""
    if a.shape != b.shape or (dtype is None and a.dtype != b.dtype):
        return float("inf")
    largest: float | None = None
    kind = a.dtype if dtype is None else dtype
    cuts = (windows(Piece("", 0, x, kind), list(x.boxes()), widest=8) for x in (a, b))
    for here, there in zip(*cuts, strict=True):
        left = gather_window(a, here, kind, sources).copy()  # the next gather reuses the buffer
        right = gather_window(b, there, kind, sources)
        if np.array_equal(left, right):
            continue
        if not kind.floating:
            return float("inf")
        x = left.view(numpy_float(kind)).astype(np.float64)
        y = right.view(numpy_float(kind)).astype(np.float64)
        gap = np.abs(x - y)
        worst = float("inf") if np.isnan(gap).any() else float(gap.max())
        largest = worst if largest is None else max(largest, worst)
    return largest


def gather_window(
    array: Array, window: Window, target: DType, sources: Sources
) -> npt.NDArray[Any]:
    """One window's elements, as unsigned integers of ``target``'s width; zeros materialised."""
    found = gather(window, array.dtype, sources)
    if found is None:
        return np.zeros(window.shape, raw_numpy(target))
    return found if target == array.dtype else cast(found, array.dtype, target)[0]


def check_equal(equal: Sequence[tuple[str, Array, Array]], sources: Sources) -> None:
    """Tensors that the source holds twice must be the same."""
    for what, a, b in equal:
        if list(a.boxes()) == list(b.boxes()):
            continue
        gap = first_difference(a, b, sources)
        if gap is not None:
            raise UserError(
                f"{what} differ (by up to {gap:.3g}), although the model says they are one",
                hint="--untie keeps both" if "tied" in what else "the checkpoint is damaged",
            )
