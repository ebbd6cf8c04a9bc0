"""What asks a run to stop between two steps."""

from __future__ import annotations

import os
import signal


class StopRequest:
    """SIGTERM or SIGINT arrived, or our launcher died (a rank that trained on alone would fight the
    next run over the folder). The loop looks between steps, and all ranks stop together."""

    def __init__(self, launcher_pid: int | None = None) -> None:
        self.signal: int | None = None
        self._launcher_pid = launcher_pid

    def install(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def asked(self) -> bool:
        orphaned = self._launcher_pid is not None and os.getppid() != self._launcher_pid
        return self.signal is not None or orphaned

    def _handle(self, number: int, frame: object) -> None:
        del frame
        if self.signal is not None:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self.signal = number
