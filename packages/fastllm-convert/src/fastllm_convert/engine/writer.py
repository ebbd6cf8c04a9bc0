"""Fills the files of a plan: every piece a few bounded tasks, all files in one stream of work."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path

from fastllm_convert.engine import writeback
from fastllm_convert.engine.copying import Done, Output, Task, run_task, tasks, write_all
from fastllm_convert.engine.journal import Journal
from fastllm_convert.engine.plan import OutputFile, Piece, Plan
from fastllm_convert.engine.sources import Sources
from fastllm_convert.files import crc32

Progress = Callable[[int], None]


class _OpenFile:
    """One output file while it is being filled."""

    def __init__(self, index: int, file: OutputFile, path: Path, done: dict[int, int]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.index, self.file = index, file
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not done:
            os.ftruncate(self.fd, 0)  # what an interrupted run left is not trusted without a record
        os.ftruncate(self.fd, file.size)
        self.output = Output(self.fd)
        self.crcs = dict(done)
        self.left = len(file.pieces) - len(done)
        self.parts: dict[int, list[tuple[int, int] | None]] = {}

    def close(self, *, durable: bool) -> None:
        literals = list(self.file.literals)
        if self.file.finish is not None:
            literals += self.file.finish([self.crcs[n] for n in range(len(self.file.pieces))])
        for offset, content in literals:
            write_all(self.fd, memoryview(content), offset)
        if durable:
            os.fsync(self.fd)
        os.close(self.fd)


class Writer:
    """Writes a plan into ``folder``. ``overflowed``: values that a cast made infinite."""

    def __init__(
        self, folder: Path, journal: Journal, sources: Sources, threads: int, *, durable: bool
    ) -> None:
        self.folder, self.journal, self.sources = folder, journal, sources
        self.threads, self.durable = threads, durable
        self.overflowed = 0
        self._lock = threading.Lock()
        self._sync = ThreadPoolExecutor(1)
        self._syncs: list[Future[None]] = []

    def run(
        self,
        plan: Plan,
        pool: ThreadPoolExecutor,
        progress: Progress,
        checks: Sequence[Callable[[], int]] = (),
    ) -> None:
        """Returns when every file is complete and durable, and every check has passed.

        ``checks`` (CRCs of the sources) run between the copies: one thread reads while another
        writes.
        """
        try:
            jobs = _interleaved(self._jobs(plan, progress), iter(checks))
            run_bounded(pool, jobs, self.threads, progress)
            for future in self._syncs:
                future.result()
        finally:
            self._sync.shutdown(cancel_futures=True)

    def _jobs(self, plan: Plan, progress: Progress) -> Iterator[Callable[[], int]]:
        for index, file in enumerate(plan.files):
            done = self.journal.done(index)
            opened = _OpenFile(index, file, self.folder / file.path, done)
            if not opened.left:
                self._submit(partial(opened.close, durable=self.durable))
            for number, piece in enumerate(file.pieces):
                if number in done:
                    progress(piece.nbytes)
                    continue
                cut = tasks(piece)
                opened.parts[number] = [None] * len(cut)
                if not cut:
                    self._piece_done(opened, number, 0)
                for part, task in enumerate(cut):
                    yield _job(self, opened, number, part, task, piece)

    def work(self, opened: _OpenFile, number: int, part: int, task: Task, piece: Piece) -> int:
        """One task, and the bookkeeping when it was the last of its piece or file."""
        want_crc = opened.file.finish is not None
        done = run_task(task, piece, self.sources, opened.output, want_crc=want_crc)
        writeback.start(opened.fd, task.offset, task.nbytes)
        with self._lock:
            self.overflowed += done.overflowed
            self._note(opened, number, part, done, task.nbytes)
        return task.nbytes

    def _note(self, opened: _OpenFile, number: int, part: int, done: Done, nbytes: int) -> None:
        parts = opened.parts[number]
        parts[part] = (done.crc, nbytes)
        if None in parts:
            return
        crc = 0
        if opened.file.finish is not None:
            for each in parts:
                crc = crc32.combine(crc, *each) if each else crc
        self._piece_done(opened, number, crc)

    def _piece_done(self, opened: _OpenFile, number: int, crc: int) -> None:
        del opened.parts[number]
        opened.crcs[number] = crc
        self.journal.record(opened.index, number, crc)
        opened.left -= 1
        if not opened.left:
            self._submit(partial(opened.close, durable=self.durable))

    def _submit(self, job: Callable[[], None]) -> None:
        self._syncs.append(self._sync.submit(job))


def _job(
    writer: Writer, opened: _OpenFile, number: int, part: int, task: Task, piece: Piece
) -> Callable[[], int]:
    return lambda: writer.work(opened, number, part, task, piece)


def _interleaved(
    first: Iterator[Callable[[], int]], second: Iterator[Callable[[], int]]
) -> Iterator[Callable[[], int]]:
    """One of each in turn, then what is left of either."""
    for job in first:
        yield job
        other = next(second, None)
        if other is not None:
            yield other
    yield from second


def run_bounded(
    pool: ThreadPoolExecutor, jobs: Iterator[Callable[[], int]], threads: int, progress: Progress
) -> None:
    """Run jobs with at most a few waiting, so that memory does not grow with their number."""
    waiting: set[Future[int]] = set()
    try:
        for job in jobs:
            waiting.add(pool.submit(job))
            if len(waiting) > 2 * threads:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    progress(future.result())
        for future in waiting:
            progress(future.result())
    except BaseException:
        for future in waiting:
            future.cancel()
        wait(waiting)
        raise
