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

from fastllm_train import loop, watchdog
from fastllm_train.data import read_step
from fastllm_train.distributed import join, place_from_env
from fastllm_train.peak import Peak

TIMEOUT_S = 2.0


def main() -> None:
    folder, fault = sys.argv[1:]
    place = place_from_env(os.environ)
    assert place is not None
    join(place, "cpu", TIMEOUT_S)
    config = tiny_config(
        parallel={"dp": 2},
        batch={"global": 4},
        data={"workers": 0},
        run={"out": folder, "hang_timeout_s": TIMEOUT_S},
    )

    def read(source: Any, consumed: int, *rest: Any) -> Any:
        if consumed == 8 and place.rank == 1:
            if fault == "sleep":
                time.sleep(60)
            os.kill(os.getpid(), signal.SIGSTOP)
        return read_step(source, consumed, *rest)

    loop.read_step = read
    loop.job_peak = lambda *_: Peak(1.0, "measured GEMM")
    watchdog.GRACE_S = 3.0
    loop.train(config, config.model.resolve(), "cpu", loop.StopRequest())


if __name__ == "__main__":
    main()
