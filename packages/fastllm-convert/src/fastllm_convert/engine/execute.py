"""Carry a plan out: a hidden folder beside the target, filled in parallel, fsynced, renamed.

``DST`` never exists half-written. Progress is recorded tensor by tensor in a journal inside the
hidden folder, so a run that was killed continues where it stopped.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

from fastllm_convert.engine.checks import check_equal, check_members
from fastllm_convert.engine.copying import CHUNK, Task, run_task, tasks, write_all
from fastllm_convert.engine.journal import Journal
from fastllm_convert.engine.plan import OutputFile, Piece, Plan
from fastllm_convert.engine.publish import publish
from fastllm_convert.engine.sources import Sources
from fastllm_convert.errors import UserError
from fastllm_convert.files import crc32

MAX_THREADS = 8
Progress = Callable[[int], None]


def default_threads() -> int:
    """One per available core, at most eight: past that the page cache is the limit."""
    return max(1, min(MAX_THREADS, len(os.sched_getaffinity(0))))


def execute(
    plan: Plan,
    target: Path,
    *,
    threads: int,
    check_crc: bool,
    progress: Progress,
    replace: bool = False,
) -> None:
    """Write ``plan`` as the folder ``target``; ``replace``: in place of the one that is there."""
    target = target.absolute()
    folder = target.parent / f".{target.name}.partial"
    with _cleaned_on_error(folder), Sources() as sources, ThreadPoolExecutor(threads) as pool:
        check_equal(plan.equal, sources)
        if check_crc:
            check_members(plan.checked, plan.sources, sources, pool)
        _require_space(plan, folder, sources)
        _prepare(folder)
        with Journal(folder / ".journal", plan.fingerprint()) as journal:
            for index, file in enumerate(plan.files):
                _write_file(index, file, folder, journal, sources, pool, threads, progress)
        (folder / ".journal").unlink()
        publish(folder, target, replace=replace)


@contextmanager
def _cleaned_on_error(folder: Path) -> Generator[None]:
    """An error leaves nothing behind; only a kill (or Ctrl-C) leaves the folder, for resuming."""
    try:
        yield
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full: {folder.parent}",
                hint="nothing was kept; free space and run again",
            ) from None
        raise UserError(f"cannot write {folder.parent}: {error.strerror or error}") from None
    except Exception:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _prepare(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True)


def _require_space(plan: Plan, folder: Path, sources: Sources) -> None:
    """Refuse before writing when the result cannot fit (holes of sparse sources cost nothing)."""
    if any(sources[s].sparse for s in plan.sources):
        return
    kept = sum(p.stat().st_blocks * 512 for p in folder.rglob("*") if p.is_file())
    parent = folder.parent
    while not parent.exists():
        parent = parent.parent
    stat = os.statvfs(parent)
    free = stat.f_bavail * stat.f_frsize
    if plan.bytes_written - kept > free:
        raise UserError(
            f"the result needs {plan.bytes_written / 1e9:.2f} GB, "
            f"{parent} has {free / 1e9:.2f} GB free"
        )


def _write_file(
    index: int,
    file: OutputFile,
    folder: Path,
    journal: Journal,
    sources: Sources,
    pool: ThreadPoolExecutor,
    threads: int,
    progress: Progress,
) -> None:
    path = folder / file.path
    path.parent.mkdir(parents=True, exist_ok=True)
    out = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        done = journal.done(index)
        if not done:
            os.ftruncate(out, 0)  # what an interrupted run left is not trusted without a record
        os.ftruncate(out, file.size)
        crcs = _write_pieces(index, file, out, done, journal, sources, pool, threads, progress)
        literals = list(file.literals)
        if file.finish is not None:
            literals += file.finish(crcs)
        for offset, content in literals:
            write_all(out, memoryview(content), offset)
        os.fsync(out)
    finally:
        os.close(out)


class _PieceState:
    """Task CRCs of one piece, folded in order once all of them are there."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.parts: list[tuple[int, int]] = [(0, 0)] * count

    def crc(self) -> int:
        total = 0
        for crc, nbytes in self.parts:
            total = crc32.combine(total, crc, nbytes)
        return total


def _write_pieces(
    index: int,
    file: OutputFile,
    out: int,
    done: dict[int, int],
    journal: Journal,
    sources: Sources,
    pool: ThreadPoolExecutor,
    threads: int,
    progress: Progress,
) -> list[int]:
    """Copy every piece that the journal does not list; returns the CRC of all, in order."""
    want_crc = file.finish is not None
    states: dict[int, _PieceState] = {}
    crcs = dict(done)
    lock = threading.Lock()

    def finish(number: int, part: int, crc: int, nbytes: int) -> None:
        with lock:
            state = states[number]
            state.parts[part] = (crc, nbytes)
            state.left -= 1
            if state.left:
                return
            crcs[number] = state.crc() if want_crc else 0
            del states[number]
            journal.record(index, number, crcs[number])

    def work(number: int, part: int, task: Task, piece: Piece) -> int:
        crc = run_task(task, piece, sources, out, want_crc=want_crc)
        finish(number, part, crc, task.nbytes)
        return task.nbytes

    def jobs() -> Iterator[Callable[[], int]]:
        for number, piece in enumerate(file.pieces):
            if number in done:
                progress(piece.nbytes)
                continue
            cut = tasks(piece)
            if not cut:
                crcs[number] = 0
                continue
            states[number] = _PieceState(len(cut))
            for part, task in enumerate(cut):
                yield lambda n=number, i=part, t=task, p=piece: work(n, i, t, p)

    run_bounded(pool, jobs(), threads, progress)
    return [crcs[n] for n in range(len(file.pieces))]


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


def progress_bar(total: int, label: str) -> tuple[Progress, Callable[[], None]]:
    """A tqdm bar on a terminal, nothing elsewhere: (advance by bytes, close)."""
    if not sys.stderr.isatty():
        return (lambda _: None), (lambda: None)
    from tqdm import tqdm

    bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr)

    def advance(nbytes: int) -> None:
        bar.update(nbytes)

    return advance, bar.close


def memory_bound(threads: int) -> int:
    """Bytes of buffers alive at once: per thread a gather and its cast (docs/convert.md)."""
    return threads * 2 * CHUNK
