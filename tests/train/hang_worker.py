"""One rank of a job that hangs: a training whose rank 1 sleeps, or stops itself, in the third step.

Usage: hang_worker.py FOLDER sleep|stop
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from train_layouts import tiny_config

from fastllm_train import loop
from fastllm_train.data import read_step
from fastllm_train.distributed import join, place_from_env
from fastllm_train.peak import Peak
from fastllm_train.watchdog import Watchdog

HANGS_IN_STEP = 3
TIMEOUT_S = 2.0  # in that step; those before take what the machine's load makes of them
PATIENCE_S = 60.0
GRACE_S = 3.0  # for a rank that is stopped and gives no sign: waited for in vain


class Watch(Watchdog):
    """Impatient in the step that hangs."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments, grace_s=GRACE_S if sys.argv[2] == "stop" else PATIENCE_S)

    def note(self, phase: str, step: int | None = None, *, limit_s: float = 0.0) -> None:
        if step == HANGS_IN_STEP:
            self._timeout = TIMEOUT_S
        super().note(phase, step, limit_s=limit_s)


def main() -> None:
    folder, fault = sys.argv[1:]
    place = place_from_env(os.environ)
    assert place is not None
    join(place, "cpu")
    config = tiny_config(
        parallel={"dp": 2},
        batch={"global": 4},
        data={"workers": 0},
        run={"out": folder, "hang_timeout_s": PATIENCE_S},
    )

    def read(source: Any, consumed: int, *rest: Any) -> Any:
        if consumed == 4 * (HANGS_IN_STEP - 1) and place.rank == 1:
            if fault == "sleep":
                time.sleep(2 * PATIENCE_S)
            os.kill(os.getpid(), signal.SIGSTOP)
        return read_step(source, consumed, *rest)

    loop.read_step = read
    loop.job_peak = lambda *_: Peak(1.0, "measured GEMM")
    loop.Watchdog = Watch
    loop.train(config, config.model.resolve(), "cpu", loop.StopRequest())


if __name__ == "__main__":
    main()
