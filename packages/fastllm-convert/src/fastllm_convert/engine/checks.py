"""CRC-32 of the zip members that a plan reads, checked as their bytes are about to be copied."""

from __future__ import annotations

import os
import threading
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastllm_convert.arrays import Array, Box, SourceFile
from fastllm_convert.engine.lanes import Job
from fastllm_convert.engine.sources import Sources
from fastllm_convert.errors import UserError
from fastllm_convert.files import crc32

if TYPE_CHECKING:
    from fastllm_convert.files.torch_zip import Member

_PART = 32 << 20
_SMALL = 64 << 10  # pickles, byteorder, version: checked whether or not a tensor lies there


class _Buffer(threading.local):
    """A megabyte per thread: stays in its processor's cache between reading and checking."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(1 << 20))


_buffer = _Buffer()


def _part_crc(source: SourceFile, start: int, stop: int, sources: Sources) -> tuple[int, int]:
    opened = sources[source]
    crc, at = 0, start
    for begin, end in opened.data_ranges(start, stop):
        if begin > at:
            crc = crc32.combine(crc, crc32.of_zeros(begin - at), begin - at)
        while begin < end:
            count = os.preadv(opened.fd, [_buffer.view[: end - begin]], begin)
            if count == 0:
                raise UserError(f"{source.path} became shorter while it was being read")
            crc = crc32.of(_buffer.view[:count], crc)
            begin += count
        at = end
    if at < stop:
        crc = crc32.combine(crc, crc32.of_zeros(stop - at), stop - at)
    return crc, stop - start


class _MemberCheck:
    """CRC-32 of one zip member, in parts that any thread may compute, each once."""

    def __init__(self, file: SourceFile, member: Member, sources: Sources) -> None:
        self.file, self.member, self.sources = file, member, sources
        count = max(1, -(-member.size // _PART))
        self._parts: list[tuple[int, int] | None] = [None] * count
        self._given = [False] * count
        self._lock = threading.Lock()

    def jobs(self, start: int, stop: int) -> Iterator[Job]:
        """What covers the file's bytes [start, stop) and was not given out before."""
        first = max(0, start - self.member.offset) // _PART
        last = min(len(self._parts), -(-(stop - self.member.offset) // _PART))
        for index in range(first, last):
            with self._lock:
                given, self._given[index] = self._given[index], True
            if not given:
                yield self._job(index)

    def rest(self) -> Iterator[Job]:
        return self.jobs(self.member.offset, self.member.offset + self.member.size)

    def _job(self, index: int) -> Job:
        start = self.member.offset + index * _PART
        stop = min(start + _PART, self.member.offset + self.member.size)

        def run() -> int:
            part = _part_crc(self.file, start, stop, self.sources)
            with self._lock:
                self._parts[index] = part
                if None not in self._parts:
                    self._compare()
            return 0

        return Job(stop - start, run)

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


class MemberChecks:
    """The members that a plan's arrays read, and the pickles and directories' own.

    ``before``: the members that one array is made of, checked about when they are copied, so that
    they are read from the disk once. ``rest``: what no array needed, or of which it needed a part.
    Members that nobody reads (optimizer moments) are left alone.
    """

    def __init__(self, checked: Sequence[tuple[SourceFile, Member]], sources: Sources) -> None:
        self._members: dict[Path, list[_MemberCheck]] = {}
        for file, member in checked:
            check = _MemberCheck(file, member, sources)
            self._members.setdefault(file.path, []).append(check)
        for members in self._members.values():
            members.sort(key=lambda c: c.member.offset)
        self._starts = {p: [c.member.offset for c in m] for p, m in self._members.items()}
        self._used: set[int] = set()

    def before(self, array: Array) -> Iterator[Job]:
        """Jobs that check what ``array`` is made of; each raises ``UserError`` on a mismatch."""
        if not self._members:
            return
        for box in array.compact.boxes():
            yield from self._covering(box, array.dtype.itemsize)

    def _covering(self, box: Box, itemsize: int) -> Iterator[Job]:
        if box.file is None:
            return
        starts = self._starts.get(box.file.path)
        if not starts:
            return
        reach = sum((n - 1) * step for n, step in zip(box.shape, box.strides, strict=True))
        stop = box.offset + reach + itemsize
        members = self._members[box.file.path]
        for at in range(bisect_right(starts, box.offset) - 1, bisect_left(starts, stop)):
            if at >= 0 and members[at].member.offset + members[at].member.size > box.offset:
                self._used.add(id(members[at]))
                yield from members[at].jobs(box.offset, stop)

    def rest(self) -> Iterator[Job]:
        """To be run after everything else."""
        for members in self._members.values():
            for check in members:
                if id(check) in self._used or check.member.size < _SMALL:
                    yield from check.rest()
