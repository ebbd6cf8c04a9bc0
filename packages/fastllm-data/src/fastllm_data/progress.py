"""Progress of a long run: a bar on a terminal, one JSON line every ten seconds elsewhere."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any

from fastllm_data.streams import Meter

INTERVAL_SECONDS = 10.0
QUIET_SECONDS = 2.0  # shorter runs need no bar


class Progress:
    """Shows bytes read of ``total`` (0: unknown), documents, tokens, rate and time left.

    Bytes are those on disk, compressed ones where inputs are; ``meter`` counts them.
    """

    def __init__(self, total: int) -> None:
        self.meter = Meter()
        self._total = total
        self._passed = 0
        self._bar: Any = None
        self._terminal = sys.stderr.isatty()
        self._started = self._said = time.monotonic()

    def pass_over(self, size: int) -> None:
        """Count what an earlier run has read: no part of this one's rate."""
        self.meter.bytes += size
        self._passed = self.meter.bytes

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def say(self, line: str) -> None:
        """A line on stderr that does not tear the bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr)

    def update(self, counts: dict[str, int]) -> None:
        """Called with the running counts after each block."""
        if self._terminal:
            self._show_bar(counts)
        else:
            self._say_line(counts)

    def _show_bar(self, counts: dict[str, int]) -> None:
        if self._bar is None:
            if time.monotonic() - self._started < QUIET_SECONDS:
                return
            from tqdm import tqdm

            self._bar = tqdm(
                total=self._total or None, unit="B", unit_scale=True, leave=False,
                initial=self._passed,
            )  # fmt: skip
            self._bar.start_t = time.time() - (time.monotonic() - self._started)
        tokens, documents = counts["tokens"], counts["documents"]
        self._bar.set_postfix_str(
            f"{documents:,} documents, {tokens / 1e6:.1f} M tokens", refresh=False
        )
        self._bar.update(self._done(counts) - self._bar.n)

    def _done(self, counts: dict[str, int]) -> int:
        done = self.meter.total(counts["input_bytes"])
        return min(done, self._total) if self._total else done

    def _say_line(self, counts: dict[str, int]) -> None:
        now = time.monotonic()
        if now - self._said < INTERVAL_SECONDS:
            return
        self._said = now
        seconds = now - self._started
        done = self._done(counts)
        rate = (done - self._passed) / seconds
        left = (self._total - done) / rate if self._total and rate else None
        line = {
            "seconds": round(seconds, 1),
            "input_bytes": done,
            "total_bytes": self._total or None,
            "documents": counts["documents"],
            "tokens": counts["tokens"],
            "bad_lines": counts["bad_lines"],
            "bytes_per_second": round(rate),
            "tokens_per_second": round(counts["tokens"] / seconds),
            "seconds_left": None if left is None else round(left, 1),
        }
        print(json.dumps(line), file=sys.stderr, flush=True)
