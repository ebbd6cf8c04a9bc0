"""One rank's life: join the job, train, say how it ended, leave."""

from __future__ import annotations

import os
import signal

from fastllm_planner.arch import ArchSpec
from fastllm_train.config import Config
from fastllm_train.distributed import Place, join, leave, pick_device
from fastllm_train.launch import LAUNCHER_PID


def run_rank(config: Config, spec: ArchSpec, place: Place, *, fresh: bool) -> int:
    """Exit status: 0 trained or saved on SIGTERM, 130 saved on Ctrl-C."""
    device = pick_device(config.run.device)
    join(place, device, config.run.longest_wait_s)
    from fastllm_train import deepspeed_nvme
    from fastllm_train.loop import StopRequest, train

    launcher = os.environ.get(LAUNCHER_PID, "")
    request = StopRequest(int(launcher) if launcher and int(launcher) == os.getppid() else None)
    request.install()
    ending = train(config, spec, device, request, fresh=fresh)
    leave()
    if place.local_rank == 0:  # of a node
        deepspeed_nvme.remove(config)
    if place.rank == 0:
        if ending.stopped:
            print(f"stopped at step {ending.step}; run the same command again to go on")
        else:
            print(f"trained to step {ending.step}; next: fastllm-train report {config.run.out}")
    return 130 if ending.stopped and request.signal == signal.SIGINT else 0
