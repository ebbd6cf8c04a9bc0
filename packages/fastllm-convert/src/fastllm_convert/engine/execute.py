"""Carry a plan out: a hidden folder beside the target, filled in parallel, fsynced, renamed.

``DST`` never exists half-written. Progress is recorded tensor by tensor in a journal inside the
hidden folder, so a run that was killed continues where it stopped.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
import sys
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from fastllm_convert.engine.checks import MemberChecks
from fastllm_convert.engine.equality import check_equal
from fastllm_convert.engine.journal import Journal
from fastllm_convert.engine.lanes import Progress
from fastllm_convert.engine.plan import Plan
from fastllm_convert.engine.publish import publish
from fastllm_convert.engine.sources import Sources
from fastllm_convert.engine.tasks import CHUNK
from fastllm_convert.engine.writer import Writer
from fastllm_convert.errors import UserError

MAX_THREADS = 8


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
    durable: bool = True,
) -> int:
    """Write ``plan`` as the folder ``target``; ``replace``: in place of the one that is there.
    ``durable``: wait until the disk has everything before the target gets its name.

    Returns how many values a cast made infinite.
    """
    _allow_open_files()
    target = target.absolute()
    folder = target.parent / f".{target.name}.partial"
    with Sources() as sources, ThreadPoolExecutor(threads) as pool:
        check_equal(plan.equal, sources)
        _require_space(plan, folder, sources)
        _prepare(folder)
        with Journal(folder / ".journal", plan.fingerprint()) as journal, _cleaned(folder):
            writer = Writer(folder, journal, sources, threads, durable=durable)
            checks = MemberChecks(plan.checked if check_crc else (), sources)
            writer.run(plan, pool, progress, checks)
            journal.remove()
            publish(folder, target, replace=replace, durable=durable)
        return writer.overflowed


def _allow_open_files() -> None:
    """Every source stays open: as many files as the system lets this process have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # "unlimited" is not a number everywhere
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@contextmanager
def _cleaned(folder: Path) -> Generator[None]:
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
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder.parent}: {error.strerror}") from None


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


def progress_bar(total: int, label: str) -> tuple[Progress, Callable[[], None]]:
    """A tqdm bar on a terminal, nothing elsewhere: (advance by bytes, close)."""
    if not sys.stderr.isatty():
        return (lambda _: None), (lambda: None)
    from tqdm import tqdm

    bar = tqdm(total=total, desc=label, unit="B", unit_scale=True, file=sys.stderr)

    def advance(nbytes: int) -> None:
        bar.update(nbytes)

    return advance, bar.close


# Python, numpy and the plan of a 70B model, measured (docs/convert.md): 30 MB, doubled.
_INTERPRETER = 60_000_000


def memory_bound(threads: int) -> int:
    """Bytes of buffers alive at once: per thread a gather and its cast (docs/convert.md)."""
    return threads * 2 * CHUNK + _INTERPRETER
