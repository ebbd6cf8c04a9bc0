"""Joining the job's process group: environment, threads, device."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from fastllm_train.errors import UserError

TIMEOUT = timedelta(minutes=10)
# The number of the socket that rank 0's store listens at, where the launcher hands one over.
STORE_FD = "FASTLLM_STORE_FD"
NO_FD = -1  # on the other ranks
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


def runtime_line(env: Mapping[str, str], threads: int) -> str:
    """What this process runs with on a CPU, for the log: threads, huge pages, malloc."""
    huge = "on" if env.get("THP_MEM_ALLOC_ENABLE") == "1" else "off (THP_MEM_ALLOC_ENABLE=1)"
    malloc = env.get("GLIBC_TUNABLES", "") or "default"
    return f"{threads} threads a process; huge pages for tensors: {huge}; malloc: {malloc}"


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


def join(place: Place, device: str, longest_wait_s: float = 0.0) -> None:
    """Set threads and device, then enter the process group. Its operations give up after ten
    minutes, or later than the watchdog, whose longest time-out is ``longest_wait_s``."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(threads_per_process(os.environ, place.local_world_size))
    if device == "cuda":
        torch.cuda.set_device(place.local_rank)
    backend = "nccl" if device == "cuda" else "gloo"
    timeout = max(TIMEOUT, timedelta(seconds=MARGIN * longest_wait_s))
    if STORE_FD in os.environ or _restarted_by_torchrun(os.environ):
        enter_group(place, backend, timeout)
    else:
        dist.init_process_group(
            backend, rank=place.rank, world_size=place.world_size, timeout=timeout
        )


def _restarted_by_torchrun(env: Mapping[str, str]) -> bool:
    """Of one node; several agents count their restarts apart."""
    return (
        env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        and env.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        and env.get("GROUP_WORLD_SIZE", "1") == "1"
    )


def enter_group(place: Place, backend: str, timeout: timedelta = TIMEOUT) -> None:
    """Make torch.distributed's process group, where torch's own way by the environment would miss
    what this launcher or torchrun does."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    fd = int(os.environ.pop(STORE_FD, NO_FD))  # no process that this one starts has it
    store: Store = TCPStore(
        host,
        port,
        is_master=fd != NO_FD,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=None if fd == NO_FD else fd,
    )
    if _restarted_by_torchrun(os.environ):
        # torchrun (torch 2.13) keeps one store for all its restarts, and ranks that start again
        # would read the addresses of the dead ones there: each start gets keys of its own.
        store = PrefixStore(f"start_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world_size, timeout=timeout
    )


def leave() -> None:
    """Leave together: a rank that goes early can fail the others' last message."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
