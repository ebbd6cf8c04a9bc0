"""Jobs of real processes over gloo, forked from one that has imported torch and DeepSpeed.

Importing them takes each process seconds of CPU; a fork takes milliseconds. Usage, by ``run_jobs``:
rank_job.py JOBS.json, a list of [world size, [worker's file, argument, …]], run one after another.
A worker is a script of this folder with a ``main`` that reads ``sys.argv``.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from fastllm_train.launch import listening_socket, worker_environment

Job = tuple[int, list[str]]
# (DeepSpeed's engine and recomputation bring the compiler.)
IMPORTED_BY_RANKS = (
    "fastllm_train.loop",
    "torch._dynamo",
    "torch._functorch.partitioners",
    "torch._inductor.compile_fx",
)
TIMEOUT_S = 300
POLL_S = 0.005
SHOWN_BYTES = 4000


def run_jobs(jobs: Sequence[Job]) -> None:
    """Run jobs in turn; fails with the log of a rank that failed."""
    with tempfile.TemporaryDirectory() as folder:
        listing = Path(folder) / "jobs.json"
        listing.write_text(json.dumps(jobs))
        done = subprocess.run(
            [sys.executable, __file__, str(listing)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr[-2 * SHOWN_BYTES :]


def run_ranks(arguments: list[str], world_size: int) -> None:
    """Run one job: a worker's file and its arguments."""
    run_jobs([(world_size, arguments)])


def run_job(job: Job, folder: Path) -> None:
    """Fork the ranks and wait; ends this process with a log if one of them fails."""
    world_size, (file, *_) = job
    ranks = fork_ranks(job, folder)
    deadline = time.monotonic() + TIMEOUT_S
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        failed = status != 0 or time.monotonic() > deadline
        if pid and not failed:
            del ranks[pid]
        elif failed:
            for running in ranks.keys() - {pid}:
                os.kill(running, signal.SIGKILL)
            rank = ranks.get(pid, next(iter(ranks.values())))
            log = (folder / str(rank)).read_text(errors="replace")[-SHOWN_BYTES:]
            sys.exit(f"{Path(file).name}, rank {rank} of {world_size}:\n{log}")
        else:
            time.sleep(POLL_S)


def fork_ranks(job: Job, folder: Path) -> dict[int, int]:
    """Process id → rank; each one's log is the file of its number in ``folder``."""
    world_size, (file, *arguments) = job
    module = importlib.import_module(Path(file).stem)
    ranks: dict[int, int] = {}
    with listening_socket() as listening:
        port, fd = listening.getsockname()[1], listening.fileno()
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                if rank > 0:
                    listening.close()  # rank 0 alone keeps it: where that is gone, nobody listens
                environment = worker_environment(os.environ, rank, world_size, port, store_fd=fd)
                _become(module.main, [file, *arguments], environment, folder / str(rank))
            ranks[pid] = rank
    return ranks


def free_port() -> int:
    """For launchers of others, which can take nothing but a number: below the ports that the system
    gives to connections, so that only another test could take it first."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _become(main: object, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """This process is a rank from here on; never returns."""
    status = 1
    try:
        with log.open("wb") as handle:
            os.dup2(handle.fileno(), sys.stdout.fileno())
            os.dup2(handle.fileno(), sys.stderr.fileno())
        os.environ.update(environment)
        sys.argv = arguments
        assert callable(main)
        main()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def import_for_ranks() -> None:
    """What ranks would each import by themselves."""
    from fastllm_train.engine_deepspeed import import_deepspeed

    import_deepspeed("cpu")
    for name in IMPORTED_BY_RANKS:
        importlib.import_module(name)


def main() -> None:
    import_for_ranks()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        with tempfile.TemporaryDirectory() as folder:
            run_job(job, Path(folder))


if __name__ == "__main__":
    main()
