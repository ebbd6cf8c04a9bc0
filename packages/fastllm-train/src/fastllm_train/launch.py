"""Starting a job's processes on this machine when no launcher did.

A supervisor, not an agent: it sets torch.distributed's environment, passes SIGTERM and SIGINT on
and waits as long as saving takes (torchrun kills after 30 s), and ends the others when one fails.
Several machines need a real launcher: torchrun, deepspeed or Slurm.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from fastllm_train.distributed import NO_FD, STORE_FD, threads_per_process
from fastllm_train.errors import UserError

POLL_S = 0.1
LAUNCHER_PID = "FASTLLM_LAUNCHER_PID"
FAILED_PEER_GRACE_S = 15.0
# glibc gives what is larger than 2 MiB back to the system when it is freed, on huge pages all the
# same: nothing is lost between blocks of different lifetimes, each block is faulted in anew.
COMPACT = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=2097152"


def worker_environment(
    env: Mapping[str, str],
    rank: int,
    world_size: int,
    port: int,
    allocator: Literal["fast", "compact"] = "fast",
    *,
    store_fd: int | None = None,
) -> dict[str, str]:
    """torch.distributed's variables for one process of a single-machine job, and
    ``speed_settings``. ``store_fd``: rank 0 inherits a socket that listens at ``port`` by this
    number."""
    handed = {} if store_fd is None else {STORE_FD: str(store_fd if rank == 0 else NO_FD)}
    return {
        **env,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **speed_settings(env, world_size, allocator),
        LAUNCHER_PID: str(os.getpid()),
        **handed,
    }


def speed_settings(
    env: Mapping[str, str], processes: int, allocator: Literal["fast", "compact"] = "fast"
) -> dict[str, str]:
    """Variables that make ``processes`` processes of a machine fast, with ``speed.allocator``; what
    ``env`` sets stays."""
    compact = {"GLIBC_TUNABLES": env.get("GLIBC_TUNABLES", COMPACT)}
    return {
        **(compact if allocator == "compact" else {}),
        "OMP_NUM_THREADS": str(threads_per_process(env, processes)),
        # torch asks for huge pages: else every large tensor is faulted in page by page on a CPU
        "THP_MEM_ALLOC_ENABLE": env.get("THP_MEM_ALLOC_ENABLE", "1"),
    }


def listening_socket() -> socket.socket:
    """At a port that was free, for rank 0 to inherit. A port that is only looked up can be taken by
    another program before rank 0 has started."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.set_inheritable(True)
    return listening


def launch(
    arguments: Sequence[str], world_size: int, allocator: Literal["fast", "compact"] = "fast"
) -> int:
    """Run ``python -m fastllm_train ARGUMENTS`` in ``world_size`` processes.

    Returns 0 when all ended with 0, else the first failure's status; a line names its rank.
    """
    command = [sys.executable, "-m", "fastllm_train", *arguments]
    workers: list[subprocess.Popen[bytes]] = []
    with listening_socket() as listening:
        port, fd = listening.getsockname()[1], listening.fileno()
        for rank in range(world_size):
            env = worker_environment(os.environ, rank, world_size, port, allocator, store_fd=fd)
            inherited = (fd,) if rank == 0 else ()
            workers.append(subprocess.Popen(command, env=env, pass_fds=inherited))
    previous = {
        number: signal.signal(number, lambda n, _: _signal_all(workers, n))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        return _supervise(workers)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def _supervise(workers: Sequence[subprocess.Popen[bytes]]) -> int:
    first_failure: tuple[int, int] | None = None
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers):
        if first_failure is None:
            first_failure = _failure(workers)
            if first_failure is not None:
                deadline = time.monotonic() + FAILED_PEER_GRACE_S
        if time.monotonic() > deadline:
            # The peers hang in a collective that will never complete.
            _signal_all(workers, signal.SIGKILL)
        time.sleep(POLL_S)
    first_failure = first_failure or _failure(workers)
    if first_failure is None:
        return 0
    rank, status = first_failure
    if status == 130:
        return 130
    if status < 0:
        name = signal.Signals(-status).name
        raise UserError(
            f"rank {rank} was killed by {name}",
            hint="run the same command again: it resumes from the last checkpoint",
        )
    print(f"error: rank {rank} ended with status {status}", file=sys.stderr)
    return status


def _failure(workers: Sequence[subprocess.Popen[bytes]]) -> tuple[int, int] | None:
    for rank, worker in enumerate(workers):
        status = worker.poll()
        if status:
            return rank, status
    return None


def _signal_all(workers: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(number)
