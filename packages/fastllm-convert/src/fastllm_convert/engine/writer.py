"""Fills the files of a plan: every piece a few bounded tasks, a lane of work for every file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

from fastllm_convert.engine import linux_calls
from fastllm_convert.engine.checks import MemberChecks
from fastllm_convert.engine.copying import Done, Output, run_task, write_all
from fastllm_convert.engine.journal import Journal
from fastllm_convert.engine.lanes import Job, Lane, Progress, run_lanes
from fastllm_convert.engine.plan import OutputFile, Piece, Plan
from fastllm_convert.engine.sources import Sources
from fastllm_convert.engine.tasks import Task, tasks
from fastllm_convert.files import crc32


class _OpenFile:
    """One output file while it is being filled."""

    def __init__(
        self, index: int, file: OutputFile, path: Path, done: dict[int, int], *, reserve: bool
    ) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.index, self.file = index, file
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        if not done:
            os.ftruncate(self.fd, 0)  # what an interrupted run left is not trusted without a record
        os.ftruncate(self.fd, file.size)
        if reserve:
            linux_calls.reserve(self.fd, file.size)
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
        self, plan: Plan, pool: ThreadPoolExecutor, progress: Progress, checks: MemberChecks
    ) -> None:
        """Returns when every file is complete (and durable), and every check has passed."""
        # Holes of a sparse source stay holes: then nothing is reserved.
        reserve = not any(self.sources[s].sparse for s in plan.sources)
        lanes = (
            Lane(self._writes(i, file, progress, reserve=reserve), self._checks(i, file, checks))
            for i, file in enumerate(plan.files)
        )
        try:
            run_lanes(lanes, checks.rest(), pool, self.threads, progress)
            for future in self._syncs:
                future.result()
        finally:
            self._sync.shutdown(cancel_futures=True)

    def _checks(self, index: int, file: OutputFile, checks: MemberChecks) -> Iterator[Job]:
        done = self.journal.done(index)
        for number, piece in enumerate(file.pieces):
            if number not in done:
                yield from checks.before(piece.array)

    def _writes(
        self, index: int, file: OutputFile, progress: Progress, *, reserve: bool
    ) -> Iterator[Job]:
        done = self.journal.done(index)
        opened = _OpenFile(index, file, self.folder / file.path, done, reserve=reserve)
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
                job = partial(self.work, opened, number, part, task, piece)
                yield Job(task.nbytes, job)

    def work(self, opened: _OpenFile, number: int, part: int, task: Task, piece: Piece) -> int:
        """One task, and the bookkeeping when it was the last of its piece or file."""
        want_crc = opened.file.finish is not None
        done = run_task(task, piece, self.sources, opened.output, want_crc=want_crc)
        if self.durable:
            linux_calls.start_writing(opened.fd, task.offset, task.nbytes)
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
