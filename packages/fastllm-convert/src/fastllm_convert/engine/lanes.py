"""Which job runs next: a few lanes (files) at a time, the least busy first.

The kernel lets one thread write to a file. Two threads on two files are twice as fast as one; two
on one file are not, but one may gather or checksum what it writes next.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

Job = Callable[[], int]
Progress = Callable[[int], None]


@dataclass(eq=False)
class _Lane:
    jobs: Iterator[Job]
    active: int = 0


class _Schedule:
    """At most ``width`` lanes are open, so that a plan of many files holds few of them open."""

    def __init__(self, lanes: Iterator[Iterator[Job]], last: Iterator[Job], width: int) -> None:
        self._waiting, self._last, self._width = lanes, last, width
        self._open: list[_Lane] = []
        self._lock = threading.Lock()
        self.stopped = False

    def take(self) -> tuple[_Lane, Job] | None:
        """The next job and its lane; None when there are no more."""
        with self._lock:
            while not self.stopped:
                self._fill()
                if not self._open:
                    job = next(self._last, None)
                    return None if job is None else (_Lane(self._last), job)
                lane = min(self._open, key=lambda each: each.active)
                job = next(lane.jobs, None)
                if job is not None:
                    lane.active += 1
                    return lane, job
                self._open.remove(lane)
            return None

    def _fill(self) -> None:
        while len(self._open) < self._width:
            jobs = next(self._waiting, None)
            if jobs is None:
                return
            self._open.append(_Lane(jobs))

    def done(self, lane: _Lane) -> None:
        with self._lock:
            lane.active -= 1


def run_lanes(
    lanes: Iterator[Iterator[Job]],
    last: Iterator[Job],
    pool: ThreadPoolExecutor,
    threads: int,
    progress: Progress,
) -> None:
    """Run every job of every lane, then those of ``last``; the first exception stops all and is
    raised here. A job returns the bytes it wrote."""
    schedule = _Schedule(lanes, last, threads)
    told = threading.Lock()

    def work() -> None:
        try:
            while (taken := schedule.take()) is not None:
                lane, job = taken
                written = job()
                schedule.done(lane)
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
