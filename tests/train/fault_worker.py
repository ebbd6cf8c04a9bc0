"""One rank of a job that runs whole trainings, one after another, with faults put in.

Usage: fault_worker.py LISTING.json OUT.json. A run's name says the fault: "poisoned…" reads samples
whose loss is no number at POISON_AT; "shifted…" passes over what a run that goes back from there
passes over; "full…" cannot write rank 1's second checkpoint. OUT: how each run ended.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from fastllm_train.config import Config, build_config
from fastllm_train.errors import PeerError, UserError

GLOBAL = 8
SAVE_EVERY = 4
POISON_AT = 5 * GLOBAL  # consumed samples: the sixth step


def run(name: str, config: Config) -> str:
    from fastllm_train import loop, portable

    read_step, save_file = loop.read_step, portable.save_file
    saves = 0

    def poisoned(source: Any, consumed: int, *rest: Any) -> Any:
        batches = read_step(source, consumed, *rest)
        if consumed != POISON_AT:
            return batches
        return [replace(b, loss_mask=np.full_like(b.loss_mask, np.nan)) for b in batches]

    def shifted(source: Any, consumed: int, *rest: Any) -> Any:
        past = consumed >= SAVE_EVERY * GLOBAL
        skipped = POISON_AT + GLOBAL - SAVE_EVERY * GLOBAL
        return read_step(source, consumed + skipped * past, *rest)

    def full(tensors: Any, path: Path, **more: Any) -> None:
        nonlocal saves
        saves += 1
        if saves > 2 and dist.get_rank() == 1:  # two files a checkpoint
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        save_file(tensors, path, **more)

    loop.read_step = {"poisoned": poisoned, "shifted": shifted}.get(name.split()[0], read_step)
    portable.save_file = full if name.startswith("full") else save_file
    try:
        ending = loop.train(config, config.model.resolve(), "cpu", loop.StopRequest())
        return f"step {ending.step}"
    except (UserError, PeerError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        loop.read_step, portable.save_file = read_step, save_file


def main() -> None:
    from fastllm_train.distributed import join, place_from_env

    place = place_from_env(os.environ)
    assert place is not None
    join(place, "cpu")
    listing = json.loads(Path(sys.argv[1]).read_text())
    endings = [{name: run(name, build_config(table)) for name, table in listing.items()}]
    gathered: list[Any] = [None] * place.world_size
    dist.all_gather_object(gathered, endings[0])
    if place.rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(gathered))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
