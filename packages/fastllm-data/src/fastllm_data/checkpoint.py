"""How far a run has come, so that it can go on after being killed."""

from __future__ import annotations

import fcntl
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from fastllm_data.errors import UserError
from fastllm_data.output import write_json

STATE_FILE = "state.json"


@dataclass
class Checkpoint:
    """A point in the input up to which the output is on disk.

    fingerprint: what must be the same when going on. stage: ``build``, or ``publish`` once only
    renaming is left. source, offset, line: the input's number, the position in it, and the lines
    read of it. counts: of the lines before. positions: (tokens, sequences, documents) of each
    dataset. sizes: bytes of the lists of bad lines.
    """

    fingerprint: dict[str, Any]
    stage: str = "build"
    source: int = 0
    offset: int = 0
    line: int = 0
    counts: dict[str, int] = field(default_factory=dict[str, int])
    positions: list[tuple[int, int, int]] | None = None
    sizes: dict[str, int] = field(default_factory=dict[str, int])

    def reach(self, source: int, offset: int, line: int) -> None:
        self.source, self.offset, self.line = source, offset, line

    def save(self, work: Path) -> None:
        write_json(work / STATE_FILE, asdict(self))


def load_checkpoint(work: Path, fingerprint: dict[str, Any]) -> Checkpoint:
    """The checkpoint in a work folder; a fresh one if the run was killed before its first.

    Raises UserError if it belongs to another job.
    """
    path = work / STATE_FILE
    if not path.exists():
        return Checkpoint(fingerprint)
    try:
        saved: dict[str, Any] = json.loads(path.read_bytes())
        found = Checkpoint(**saved)
        if found.positions is not None:
            found.positions = [(p[0], p[1], p[2]) for p in found.positions]
    except (ValueError, TypeError, IndexError) as error:
        raise UserError(
            f"{path}: not a checkpoint of fastllm-data", "--force starts again"
        ) from error
    # Through JSON, so that tuples and lists compare equal.
    wanted: dict[str, Any] = json.loads(json.dumps(fingerprint))
    changed = [key for key in wanted if found.fingerprint.get(key) != wanted[key]]
    if changed:
        raise UserError(
            f"{work} is of a run with other {' and '.join(changed)}",
            "resume with the same arguments and inputs, or start again with --force",
        )
    return found


def lock_folder(work: Path) -> BinaryIO:
    """Hold the folder until the file returned is closed, or the process ends.

    Raises UserError if another process holds it.
    """
    file = (work / "lock").open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        who = file.read(100).decode(errors="replace").strip()
        file.close()
        raise UserError(f"{work}: another run is writing it{who and f' ({who})'}") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n".encode())
    file.flush()
    return file


class BadLines:
    """Lists bad lines in ``errors.txt``, and if ``keep`` the lines themselves in ``quarantine``."""

    SHOWN = 5

    def __init__(self, work: Path, *, keep: bool, sizes: dict[str, int]) -> None:
        self._paths = {"errors.txt": work / "errors.txt"}
        if keep:
            self._paths["quarantine"] = work / "quarantine"
        self._files: dict[str, BinaryIO] = {}
        self.count = 0
        for name, path in self._paths.items():
            if path.exists():  # lines after the checkpoint will come again
                os.truncate(path, sizes.get(name, 0))

    def add(self, source: str, line: int, message: str, raw: bytes) -> str:
        """Record one line; returns how it is described."""
        self.count += 1
        said = f"{source}:{line}: {message}"
        for name, content in (("errors.txt", said.encode()), ("quarantine", raw)):
            if name in self._paths:
                if name not in self._files:
                    self._files[name] = self._paths[name].open("ab")
                self._files[name].write(content + b"\n")
        return said

    def sync(self) -> dict[str, int]:
        """Make what was recorded durable; returns the sizes of the files."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: path.stat().st_size for name, path in self._paths.items() if path.exists()}

    def __enter__(self) -> BadLines:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
