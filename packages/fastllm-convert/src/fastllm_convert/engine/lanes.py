"""Which job runs next: a few lanes (files) at a time, the least busy first.

The kernel lets one thread write to a file. Two threads on two files are twice as fast as one; two
on one file are not: so while one writes, the other checks sources, or gathers what comes next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

Progress = Callable[[int], None]

# How far checks may run ahead of writing, or behind: what one read is then still in the page cache
# when the other needs it, however large the model.
_DISTANCE = 1 << 30


class Job(NamedTuple):
    """``run`` returns the bytes it wrote; ``nbytes`` is how many it handles."""

    nbytes: int
    run: Callable[[], int]


@dataclass(eq=False)
class Lane:
    """The work of one output file. ``writes`` are issued in order, beside ``checks`` in theirs."""

    writes: Iterator[Job]
    checks: Iterator[Job] = field(default_factory=lambda: iter(()))
    active: int = 0
    writing: int = 0
    written: int = 0
    checked: int = 0

    def take(self) -> tuple[bool, Job] | None:
        """(is it a write?, the job). None when there are no more."""
        lead = self.checked - self.written
        prefer_check = lead < -_DISTANCE or (self.writing > 0 and lead < _DISTANCE)
        for is_check in (True, False) if prefer_check else (False, True):
            job = next(self.checks if is_check else self.writes, None)
            if job is not None:
                if is_check:
                    self.checked += job.nbytes
                else:
                    self.written += job.nbytes
                return not is_check, job
        return None


class _Schedule:
    """At most ``width`` lanes are open, so that a plan of many files holds few of them open."""

    def __init__(self, lanes: Iterator[Lane], last: Iterator[Job], width: int) -> None:
        self._waiting, self._last, self._width = lanes, Lane(iter(()), last), width
        self._open: list[Lane] = []
        self._lock = threading.Lock()
        self.stopped = False

    def take(self) -> tuple[Lane, bool, Job] | None:
        """The next job, its lane, and whether it writes; None when there are no more."""
        with self._lock:
            while not self.stopped:
                self._fill()
                lane = min(self._open, key=lambda each: each.active, default=self._last)
                taken = lane.take()
                if taken is not None:
                    lane.active += 1
                    lane.writing += taken[0]
                    return lane, *taken
                if lane is self._last:
                    return None
                self._open.remove(lane)
            return None

    def _fill(self) -> None:
        while len(self._open) < self._width:
            lane = next(self._waiting, None)
            if lane is None:
                return
            self._open.append(lane)

    def done(self, lane: Lane, is_write: bool) -> None:
        with self._lock:
            lane.active -= 1
            lane.writing -= is_write


def run_lanes(
    lanes: Iterator[Lane],
    last: Iterator[Job],
    pool: ThreadPoolExecutor,
    threads: int,
    progress: Progress,
) -> None:
    """Run every job of every lane, then those of ``last``; the first exception stops all and is
    raised here."""
    schedule = _Schedule(lanes, last, threads)
    told = threading.Lock()

    def work() -> None:
        try:
            while (taken := schedule.take()) is not None:
                lane, is_write, job = taken
                written = job.run()
                schedule.done(lane, is_write)
                with told:
                    progress(written)
        except BaseException:
            schedule.stopped = True
            raise

    workers = [pool.submit(work) for _ in range(threads)]
    try:
        for worker in workers:
            worker.result()
    finally:
        schedule.stopped = True
        for worker in workers:
            worker.exception()
