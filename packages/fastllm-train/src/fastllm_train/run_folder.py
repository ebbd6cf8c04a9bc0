"""The folder of a run ([run]): what lies where, and writing a file whole or not at all."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from fastllm_train.errors import UserError
from fastllm_train.toml_text import to_toml


@dataclass(frozen=True)
class RunConfig:
    """``seed`` drives initialisation. ``device`` "auto" takes CUDA when a GPU is visible. A job in
    which nothing moves for ``hang_timeout_s`` seconds ends with a report (0: it waits); a save may
    take ``save_timeout_s``, as storage can be slow."""

    out: str = "runs/train"
    seed: int = 1234
    device: Literal["cpu", "cuda", "auto"] = "auto"
    hang_timeout_s: float = 600.0
    save_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if not self.out:
            raise UserError("run.out is empty", hint="name a folder for the run")
        if self.seed < 0:
            raise UserError(f"run.seed={self.seed} is negative")
        for name in ("hang_timeout_s", "save_timeout_s"):
            if getattr(self, name) < 0:
                raise UserError(f"run.{name}={getattr(self, name)} is negative")

    @property
    def longest_wait_s(self) -> float:
        """How long a rank may have to wait for another; 0: for ever."""
        return max(self.hang_timeout_s, self.save_timeout_s) if self.hang_timeout_s else 0.0


@dataclass(frozen=True)
class RunFolder:
    """Paths of docs/architecture.md, "A run's folder"."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"


_locks: list[IO[str]] = []


def lock(folder: RunFolder) -> None:
    """Make this process the only one that trains in ``folder``, until it ends.

    ``UserError`` when another one does. The kernel drops the lock with its process, however that
    dies. A file system without locks is trained on unlocked.
    """
    folder.root.mkdir(parents=True, exist_ok=True)
    file = (folder.root / ".lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise UserError(
            f"another run is training in {folder.root}",
            hint="wait until it has stopped, or set another run.out",
        ) from error
    except OSError:
        file.close()
        return
    _locks.append(file)


def leave_locks() -> None:
    """In a forked process: close its copies, so that the locks die with the process that took
    them."""
    while _locks:
        _locks.pop().close()


def fsync_folder(folder: Path) -> None:
    """Make a rename or a new name in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write beside ``path``, fsync, rename: a reader sees the old file or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    raw = content.encode("utf-8") if isinstance(content, str) else content
    with temporary.open("wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_folder(path.parent)


def write_config(folder: RunFolder, table: Mapping[str, Any]) -> None:
    """OUT/config.toml, the resolved config."""
    write_atomically(folder.config, to_toml(table))
