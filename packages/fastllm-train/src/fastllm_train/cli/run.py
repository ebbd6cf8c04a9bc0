"""``fastllm-train run``: train, alone or as one rank of a job."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

import click

from fastllm_train.cli.app import verb


@verb("run", "fastllm-train run configs/quickstart.toml optim.lr=3e-4 run.out=runs/a")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--fresh", is_flag=True, help="Delete the run's checkpoints and start again.")
def command(config: Path, overrides: tuple[str, ...], fresh: bool) -> int:
    """Train as CONFIG (TOML) says, from OUT/checkpoints if there is one.

    Alone it starts the dp*tp*pp*cp processes itself; under torchrun, deepspeed or another launcher
    that sets RANK and WORLD_SIZE it joins the job.
    """
    from fastllm_train.config import load_config
    from fastllm_train.distributed import place_from_env
    from fastllm_train.errors import UserError
    from fastllm_train.refusals import refuse

    settings = load_config(config, overrides)
    spec = settings.model.resolve()
    refuse(settings, spec)
    world_size = settings.parallel.world_size
    place = place_from_env(os.environ)
    if place is not None:
        if place.world_size != world_size:
            raise UserError(
                f"{place.world_size} processes were started, the config needs "
                f"dp*tp*pp*cp = {world_size}",
                hint=f"start {world_size} processes, or set parallel.dp",
            )
        from fastllm_train.session import run_rank

        _end(run_rank(settings, spec, place, fresh=fresh))
    allocator = settings.speed.allocator
    if world_size > 1 or allocator == "compact":  # which is set before a process starts
        from fastllm_train.launch import launch

        arguments = ["run", str(config), *overrides, *(["--fresh"] if fresh else [])]
        status = launch(arguments, world_size, allocator)
        sys.stdout.flush()
        return status
    from fastllm_train.launch import worker_environment

    os.environ.update(worker_environment(os.environ, 0, 1, port=0))  # nobody else has to know it
    from fastllm_train.session import run_rank

    alone = place_from_env(os.environ)
    assert alone is not None
    _end(run_rank(settings, spec, alone, fresh=fresh))


def _end(status: int) -> NoReturn:
    """End this rank without tearing the interpreter down: with gloo's threads still alive that
    aborts now and then ("terminate called without an active exception", torch 2.13), after all
    work is done and on disk."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
