"""Arrays that are expensive to build, kept in a folder that many processes and hosts may share.

An entry is a folder named by the hash of everything that its arrays depend on. It is written under
a temporary name and appears whole, by rename, so that a reader never sees half of one. A lock file
keeps other processes from building the same entry meanwhile; it is created exclusively and renewed
by its holder, so it can be told from one that a killed process left. The lock only saves work: two
holders at once, which a stalled filesystem can cause, write the same bytes, and the first rename
wins. Nothing relies on the clocks of hosts, or on advisory locks of a network filesystem.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import socket
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fastllm_data.errors import UserError

SCHEMA: Final = 1
DESCRIPTION: Final = "description.json"
RENEW_SECONDS: Final = 5.0
STALE_SECONDS: Final = 60.0  # not renewed for so long: its holder is gone
POLL_SECONDS: Final = 0.02

Arrays = dict[str, NDArray[Any]]


@dataclass
class CachedArrays:
    """Arrays by name; pickled as the path of their entry when they are mapped from one."""

    arrays: Arrays
    entry: Path | None = None

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        return {"arrays": self.arrays if self.entry is None else None, "entry": self.entry}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.entry = state["entry"]
        self.arrays = state["arrays"]
        if self.entry is not None:
            loaded = _load(self.entry, check=False)  # checked when it was first loaded
            if loaded is None:
                raise UserError(
                    f"{self.entry}: the cached indices are gone or damaged",
                    "do not clear cache_dir while it is in use",
                )
            self.arrays = loaded


def load_or_build(
    folder: Path | None, key: Mapping[str, Any], build: Callable[[], Arrays]
) -> CachedArrays:
    """The arrays for ``key``: from ``folder`` if it has them, else built, and kept there.

    key: everything that the arrays depend on, as JSON values; contents of files by their hashes.
    Where the folder cannot be written a RuntimeWarning says so and the arrays stay in memory.
    """
    if folder is None:
        return CachedArrays(build())
    text = json.dumps({"schema": SCHEMA, **key}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:40]
    entry = folder / digest
    found = _load(entry)
    if found is not None:
        return CachedArrays(found, entry)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove(entry, folder)  # damaged, if it is there at all
        with _locked(folder / f"{digest}.lock", (entry / DESCRIPTION).exists) as mine:
            found = _load(entry)
            if found is None and mine:
                _publish(folder, entry, text, build())
                found = _load(entry, check=False)
    except OSError as error:
        warnings.warn(
            f"{folder}: {error.strerror or error}: the indices are not cached",
            RuntimeWarning,
            stacklevel=2,
        )
        found = None
    return CachedArrays(build()) if found is None else CachedArrays(found, entry)


def _load(entry: Path, *, check: bool = True) -> Arrays | None:
    """The arrays of an entry, mapped; None if it is not there or not as it was written."""
    try:
        described: dict[str, Any] = json.loads((entry / DESCRIPTION).read_bytes())
        arrays: Arrays = {}
        for name, crc in described["crc32"].items():
            array = np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if check and _crc32(array) != crc:
                return None
            arrays[name] = array.view(np.ndarray)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError):
        return None
    return arrays


def _crc32(array: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(array).data.cast("B"))


def _publish(folder: Path, entry: Path, key: str, arrays: Arrays) -> None:
    """Write an entry under a temporary name and rename it; if another was faster, keep that one."""
    partial = folder / f".{entry.name}.{socket.gethostname()}.{os.getpid()}.{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        crcs: dict[str, int] = {}
        for name, array in arrays.items():
            with (partial / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
            crcs[name] = _crc32(array)
        with (partial / DESCRIPTION).open("w", encoding="utf-8") as file:
            json.dump({"key": json.loads(key), "crc32": crcs}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        try:
            partial.rename(entry)
        except OSError:
            if not (entry / DESCRIPTION).exists():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove(entry: Path, folder: Path) -> None:
    """By rename first, so that no reader sees half of it."""
    doomed = folder / f".{entry.name}.{secrets.token_hex(4)}.damaged"
    with contextlib.suppress(FileNotFoundError):
        entry.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: Path, ready: Callable[[], bool]) -> Generator[bool]:
    """Hold the lock, True; or leave without it, False, as soon as ``ready()``."""
    token = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
    if not _acquire(path, token, ready):
        yield False
        return
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):  # broken by another: the rename decides
                os.utime(path)

    thread = threading.Thread(target=renew, name="index-cache-lock", daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        if _holder(path) == token:
            with contextlib.suppress(FileNotFoundError):
                path.unlink()


def _acquire(path: Path, token: str, ready: Callable[[], bool]) -> bool:
    seen: object = None
    since = time.monotonic()
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(token)
            return True
        except FileExistsError:
            pass
        if ready():
            return False
        state = _state(path)
        if state != seen:
            seen, since = state, time.monotonic()
        elif time.monotonic() - since > STALE_SECONDS or _holder_died_here(path):
            # Only one process gets to rename it; then all start over.
            broken = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
            with contextlib.suppress(FileNotFoundError):
                path.rename(broken)
            with contextlib.suppress(FileNotFoundError):
                broken.unlink()
            seen = None
        time.sleep(POLL_SECONDS)


def _state(path: Path) -> tuple[int, int] | None:
    try:
        info = path.stat()
    except FileNotFoundError:
        return None
    return info.st_ino, info.st_mtime_ns


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _holder_died_here(path: Path) -> bool:
    """Whether the lock's holder was a process of this host and no longer runs."""
    host, _, rest = _holder(path).partition(" ")
    pid = rest.partition(" ")[0]
    if host != socket.gethostname() or not pid.isdecimal():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
