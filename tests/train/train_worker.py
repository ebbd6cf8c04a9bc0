"""One rank of a test job: runs several configs one after another and saves their trajectories.

Started by ``run_layouts`` with torch.distributed's environment: CONFIGS.json OUT.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from train_layouts import Trajectory, samples_of

from fastllm_train.config import Config, build_config, to_table
from fastllm_train.data import read_step
from fastllm_train.launch import free_port, worker_environment
from fastllm_train.portable import PortableCheckpoint, is_portable
from fastllm_train.schedule import learning_rate


def run_layouts(configs: dict[str, Config], folder: Path) -> dict[str, Trajectory]:
    """Run every config, all of the same world size, in one job of real processes over gloo."""
    sizes = {config.parallel.world_size for config in configs.values()}
    (world_size,) = sizes
    listing = folder / "configs.json"
    listing.write_text(json.dumps({name: to_table(c) for name, c in configs.items()}))
    run_ranks([__file__, str(listing), str(folder)], world_size)
    return {name: _read(folder / f"{name}.pt") for name in configs}


def run_ranks(arguments: list[str], world_size: int) -> None:
    """Run a Python script as the ranks of a job; fails with the log of a rank that failed."""
    port = free_port()
    command = [sys.executable, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            command,
            env=worker_environment(env, rank, world_size, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    logs = [worker.communicate(timeout=300)[0] for worker in workers]
    for worker, log in zip(workers, logs, strict=True):
        assert worker.returncode == 0, log[-4000:]


def _read(path: Path) -> Trajectory:
    raw: dict[str, Any] = torch.load(path, weights_only=True)
    return Trajectory(raw["losses"], raw["norms"], raw["weights"])


SAVE_AT = 3


def _run(name: str, config: Config) -> dict[str, Any]:
    """All steps. "save…" writes a checkpoint into run.out after SAVE_AT steps; "load…" starts from
    that one; "unmarked…" breaks the gradient norm on purpose."""
    import fastllm_train.engine_deepspeed as module

    spec = config.model.resolve()
    source = samples_of(config, spec)
    folder = Path(config.run.out) / f"global_step{SAVE_AT}"
    loading = name.startswith("load")
    start = PortableCheckpoint(folder, spec) if loading and is_portable(folder) else None
    marked = module.mark_counted
    if name.startswith("unmarked"):
        module.mark_counted = lambda *_: None
    engine = module.DeepSpeedEngine(config, spec, "cpu", start)
    module.mark_counted = marked
    first = 1
    if loading:
        state = engine.load(folder)
        first = state["step"] + 1
        assert state["consumed_samples"] == SAVE_AT * config.batch.global_size
    losses: list[float] = []
    norms: list[float] = []
    for step in range(first, config.schedule.steps + 1):
        consumed = (step - 1) * config.batch.global_size
        dp_rank = config.parallel.dp_rank(torch.distributed.get_rank())
        batches = read_step(source, consumed, config.batch, config.parallel.dp, dp_rank, spec.vocab)
        lr = learning_rate(config.schedule, config.optim.lr, step)
        outcome = engine.train_step(batches, lr, stop=False)
        losses.append(outcome.loss)
        norms.append(outcome.grad_norm)
        if name.startswith("save") and step == SAVE_AT:
            done = consumed + config.batch.global_size
            engine.save(folder, {"step": step, "consumed_samples": done})
            torch.distributed.barrier()
    return {"losses": losses, "norms": norms, "weights": dict(engine.master_parameters())}


def main() -> None:
    from fastllm_train.distributed import join, place_from_env

    listing, folder = Path(sys.argv[1]), Path(sys.argv[2])
    place = place_from_env(os.environ)
    assert place is not None
    join(place, "cpu")
    for name, table in json.loads(listing.read_text()).items():
        result = _run(name, build_config(table))
        if place.rank == 0:
            torch.save(result, folder / f"{name}.pt")
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
