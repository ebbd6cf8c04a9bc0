"""Progress of a long run: a bar on a terminal, one JSON line every ten seconds elsewhere."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any

INTERVAL_SECONDS = 10.0


class Progress:
    """Shows bytes read of ``total`` (0: unknown), documents, tokens, rate and time left.

    ``done``: bytes that an earlier run has read.
    """

    def __init__(self, total: int, done: int = 0) -> None:
        self._total = max(0, total - done)
        self._bar: Any = None
        self._started = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=self._total or None, unit="B", unit_scale=True, leave=False)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def update(self, counts: dict[str, int]) -> None:
        """Called with the running counts after each block."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{counts['tokens'] / 1e6:.1f} M tokens", refresh=False)
            self._bar.update(counts["input_bytes"] - self._bar.n)
            return
        now = time.monotonic()
        if now - self._said < INTERVAL_SECONDS:
            return
        self._said = now
        seconds = now - self._started
        rate = counts["input_bytes"] / seconds
        left = (self._total - counts["input_bytes"]) / rate if self._total and rate else None
        line = {
            "seconds": round(seconds, 1),
            "input_bytes": counts["input_bytes"],
            "total_bytes": self._total or None,
            "documents": counts["documents"],
            "tokens": counts["tokens"],
            "bytes_per_second": round(rate),
            "seconds_left": None if left is None else round(max(0.0, left), 1),
        }
        print(json.dumps(line), file=sys.stderr, flush=True)
