"""The last step: fsync, then one rename. And the first: is the target's name free?"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from fastllm_convert.errors import UserError

# What a folder must hold before --force replaces it: a checkpoint's own marks, not just any folder.
_MARKS = (
    "config.json",
    "params.json",
    "latest",
    "latest_checkpointed_iteration.txt",
)


def require_free(src: Path, dst: Path, *, force: bool) -> None:
    """DST may be absent or an empty folder; with ``force`` also a converted checkpoint."""
    if src.resolve() == dst.resolve() or src.resolve() in dst.resolve().parents:
        raise UserError(f"{dst} is inside the source or is the source")
    if dst.resolve() in src.resolve().parents:
        raise UserError(f"{dst} contains the source")
    if not dst.exists() and not dst.is_symlink():
        return
    if not dst.is_dir():
        raise UserError(f"{dst} is a file")
    if not any(dst.iterdir()):
        return
    if not force:
        raise UserError(
            f"{dst} exists and is not empty", hint="choose another name, or pass --force"
        )
    if not any((dst / mark).is_file() for mark in _MARKS):
        raise UserError(f"{dst} is not a checkpoint: --force does not replace it")


def publish(folder: Path, target: Path, *, replace: bool, durable: bool = True) -> None:
    """Give the finished ``folder`` its name. The old one, if any, goes only after that."""
    if durable:
        for directory in [*(p for p in folder.rglob("*") if p.is_dir()), folder]:
            fsync_folder(directory)
    old: Path | None = None
    if target.is_dir():
        if not any(target.iterdir()):
            target.rmdir()
        elif replace:
            old = target.with_name(f".{target.name}.replaced-{os.getpid()}")
            target.rename(old)
    try:
        folder.rename(target)
    except OSError:
        if old is not None:
            old.rename(target)
        raise
    if durable:
        fsync_folder(target.parent)
    if old is not None:
        shutil.rmtree(old)


def fsync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
