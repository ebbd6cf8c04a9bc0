"""Joining the job's process group: environment, threads, device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from fastllm_train.errors import UserError

TIMEOUT = timedelta(minutes=10)
MARGIN = 1.5  # the watchdog reports before a collective operation gives up


@dataclass(frozen=True)
class Place:
    """This process in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def place_from_env(env: Mapping[str, str]) -> Place | None:
    """Where a launcher (torchrun, deepspeed) put this process; None when there was none."""
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    try:
        world = int(env["WORLD_SIZE"])
        return Place(
            rank=int(env["RANK"]),
            world_size=world,
            local_rank=int(env.get("LOCAL_RANK", "0")),
            local_world_size=int(env.get("LOCAL_WORLD_SIZE", env.get("LOCAL_SIZE", str(world)))),
        )
    except ValueError as error:
        raise UserError(f"the launcher's RANK or WORLD_SIZE is not a number: {error}") from error


def usable_cores() -> int:
    """Cores this process may run on (a container's affinity mask, not the whole machine)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_process(env: Mapping[str, str], local_world_size: int) -> int:
    """OMP_NUM_THREADS if set, else the machine's cores shared evenly by its processes."""
    given = env.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return max(1, usable_cores() // local_world_size)


def pick_device(wanted: str) -> str:
    """ "cpu" or "cuda". ``UserError`` when CUDA is asked for and no GPU is visible."""
    import torch

    visible = torch.cuda.is_available()
    if wanted == "cuda" and not visible:
        raise UserError(
            'run.device="cuda", but torch sees no GPU',
            hint='set run.device="cpu", or install a CUDA build of torch',
        )
    return "cuda" if visible and wanted != "cpu" else "cpu"


def join(place: Place, device: str, hang_timeout_s: float = 0.0) -> None:
    """Set threads and device, then enter the process group through DeepSpeed. Its operations give
    up after ten minutes, or later than a watchdog of ``hang_timeout_s``."""
    import torch

    torch.set_num_threads(threads_per_process(os.environ, place.local_world_size))
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    from fastllm_train.deepspeed_setup import import_deepspeed

    deepspeed = import_deepspeed(device)
    deepspeed.init_distributed(
        dist_backend="nccl" if device == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=max(TIMEOUT, timedelta(seconds=MARGIN * hang_timeout_s)),
    )


def leave() -> None:
    """Leave together: a rank that goes early can fail the others' last message."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
