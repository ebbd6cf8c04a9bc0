"""One rank of a job that runs whole trainings, one after another, with faults put in.

Usage: fault_worker.py LISTING.json OUT.json. A run's name says the fault: "poisoned…" reads samples
whose loss is no number at POISON_AT, "planted…" does so on rank 1 only; "infinite…" has a gradient
that is infinite there, on rank 1 only; "shifted…" passes over what a run that goes back from there
passes over, "omitted…" over that one step; "full…" has no room for rank 1's second checkpoint (its
files may not grow, by the kernel's limit). OUT: how each run ended. In DeepSpeed's format the other
rank is then left waiting: rank 1 says how it ended on stderr, and fails the job.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from fastllm_train import loop
from fastllm_train.config import Config, build_config
from fastllm_train.engine import StepOutcome
from fastllm_train.engine_choice import build_engine
from fastllm_train.engine_deepspeed import DeepSpeedEngine
from fastllm_train.errors import PeerError, UserError
from fastllm_train.peak import Peak
from fastllm_train.run_folder import leave_locks

GLOBAL = 8
SAVE_EVERY = 4
POISON_AT = 5 * GLOBAL  # consumed samples: the sixth step


def run(name: str, config: Config) -> str:
    read_step, build = loop.read_step, loop.build_engine

    def poisoned(source: Any, consumed: int, *rest: Any) -> Any:
        batches = read_step(source, consumed, *rest)
        if consumed != POISON_AT:
            return batches
        return [replace(b, loss_mask=np.full_like(b.loss_mask, np.nan)) for b in batches]

    def planted(*arguments: Any) -> Any:
        return (poisoned if dist.get_rank() == 1 else read_step)(*arguments)

    def passing_over(first: int, count: int) -> Any:
        def read(source: Any, consumed: int, *rest: Any) -> Any:
            return read_step(source, consumed + count * (consumed >= first), *rest)

        return read

    back_to = SAVE_EVERY * GLOBAL
    readers = {
        "poisoned": poisoned,
        "planted": planted,
        "shifted": passing_over(back_to, POISON_AT + GLOBAL - back_to),
        "omitted": passing_over(POISON_AT, GLOBAL),
    }
    loop.read_step = readers.get(name.split()[0], read_step)
    engines = {"infinite": infinite_gradient, "full": FullDisk}
    loop.build_engine = engines.get(name.split()[0], build)
    try:
        ending = loop.train(config, config.model.resolve(), "cpu", loop.StopRequest())
        return f"step {ending.step}"
    except (UserError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        loop.read_step, loop.build_engine = read_step, build
        leave_locks()  # another run of this process may go on in the folder
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def infinite_gradient(config: Config, *arguments: Any) -> Any:
    """An engine in which one parameter's gradient is infinite in the sixth step, on rank 1."""
    engine: Any = build_engine(config, *arguments)
    train_step, steps = engine.train_step, count(1)

    def with_infinity(*arguments: Any, **more: Any) -> StepOutcome:
        bad = next(steps) == 6 and dist.get_rank() == 1
        last = list(engine._model.parameters())[-1]
        hook = last.register_hook(lambda grad: grad * float("inf") if bad else grad)
        try:
            return train_step(*arguments, **more)
        finally:
            hook.remove()

    engine.train_step = with_infinity
    return engine


class FullDisk(DeepSpeedEngine):
    """From the eighth step on rank 1 cannot write large files."""

    steps = 0

    def train_step(self, *arguments: Any, **more: Any) -> StepOutcome:
        self.steps += 1
        if self.steps == 2 * SAVE_EVERY and dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        return super().train_step(*arguments, **more)


def main() -> None:
    from fastllm_train.distributed import join, place_from_env

    place = place_from_env(os.environ)
    assert place is not None
    join(place, "cpu")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    loop.job_peak = lambda *_: Peak(1.0, "measured GEMM")  # a second a run
    endings: dict[str, str] = {}
    for name, table in json.loads(Path(sys.argv[1]).read_text()).items():
        config = build_config(table)
        endings[name] = run(name, config)
        if name.startswith("full") and config.checkpoint.format == "deepspeed":
            sys.exit(endings[name])
    gathered: list[Any] = [None] * place.world_size
    dist.all_gather_object(gathered, endings)
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(gathered))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
