"""What an interrupted run had finished: one line a tensor, written after its bytes.

A killed process loses none of its ``write``s (they are in the page cache), so a line in the journal
means that the bytes before it are there. A crashed machine may lose either; the journal therefore
names the boot it was written in and counts for nothing after another one.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from fastllm_convert.errors import UserError


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: then never resume
        return os.urandom(16).hex()


class Journal:
    """A context manager; the file stays locked while open, so that two runs cannot share it."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self._header = f"{fingerprint} {_boot_id()}"
        self._done: dict[int, dict[int, int]] = {}
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            import fcntl

            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._fd)
            raise UserError(f"another run is writing {path.parent}") from None
        self._load()

    def _load(self) -> None:
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            lines = file.read().decode("ascii", "replace").split("\n")
        complete = lines[:-1]  # a line cut short by the kill does not count
        if not complete or complete[0] != self._header:
            os.ftruncate(self._fd, 0)
            os.write(self._fd, f"{self._header}\n".encode())
            return
        for line in complete[1:]:
            file_index, number, crc = (int(part) for part in line.split())
            self._done.setdefault(file_index, {})[number] = crc
        if lines[-1]:
            os.ftruncate(self._fd, sum(len(x) + 1 for x in complete))

    def done(self, file_index: int) -> dict[int, int]:
        """Piece number → CRC-32, for the pieces of one file that need no copying."""
        return self._done.get(file_index, {})

    def record(self, file_index: int, number: int, crc: int) -> None:
        os.write(self._fd, f"{file_index} {number} {crc}\n".encode())

    def remove(self) -> None:
        """The work is complete: the folder holds nothing but the result from now on."""
        self._path.unlink()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _value: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        os.close(self._fd)
