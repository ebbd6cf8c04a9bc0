"""SHA-256 of a file while it is being written."""

from __future__ import annotations

import hashlib
import threading
from pathlib import Path
from types import TracebackType

BLOCK = 1 << 20
WAIT_SECONDS = 0.02


class GrowingDigest:
    """Hashes what is appended to a file in a thread of its own, so that none is left at the end.

    Bytes that have been written must not change afterwards.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self._error: OSError | None = None
        self._complete = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="sha256")

    def _run(self) -> None:
        block = memoryview(bytearray(BLOCK))
        try:
            with self._path.open("rb", buffering=0) as file:
                while not self._stop:
                    complete = self._complete.is_set()  # asked for before reading
                    if count := file.readinto(block):
                        self._digest.update(block[:count])
                    elif complete:
                        return
                    else:
                        self._complete.wait(WAIT_SECONDS)
        except OSError as error:
            self._error = error

    def finish(self) -> str:
        """The hex digest, once nothing is written any more. Raises OSError if reading failed."""
        self._complete.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def __enter__(self) -> GrowingDigest:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop = True
        self._complete.set()
        self._thread.join()
