"""``fastllm-train launch``: a job that starts again by itself, here or on a cluster."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from fastllm_train.cli.app import verb


@verb("launch", "fastllm-train launch configs/llama-2-7b.toml --nodes 4")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[SECTION.KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(1), default=1, show_default=True)
@click.option("--max-restarts", type=click.IntRange(0), default=3, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the files; RUN.OUT/launch.")
@click.option("--write", is_flag=True, help="Write the files for one node, too; start nothing.")
def command(
    config: Path,
    overrides: tuple[str, ...],
    nodes: int,
    max_restarts: int,
    out: Path | None,
    write: bool,
) -> None:
    """On one node: train CONFIG under torchrun, which starts all ranks again from the last
    checkpoint when one dies. For several: write files for Slurm, torchrun and deepspeed."""
    from fastllm_train.cluster import Job, cluster_files, torchrun_command
    from fastllm_train.config import load_config
    from fastllm_train.launch import speed_settings
    from fastllm_train.refusals import refuse
    from fastllm_train.run_folder import write_atomically

    settings = load_config(config, overrides)
    refuse(settings, settings.model.resolve())
    job = Job(
        name=Path(settings.run.out).name,
        run=["run", str(config), *overrides],
        processes=settings.parallel.world_size,
        nodes=nodes,
        max_restarts=max_restarts,
        gpus=settings.run.device != "cpu",
    )
    if nodes == 1 and not write:
        command = torchrun_command(job)
        click.echo(" ".join(command), err=True)
        sys.stdout.flush()
        sys.stderr.flush()
        chosen = speed_settings(os.environ, job.processes, settings.speed.allocator)
        environment = {**os.environ, **chosen}
        os.execve(command[0], command, environment)
    folder = out if out is not None else Path(settings.run.out) / "launch"
    for name, text in cluster_files(job).items():
        write_atomically(folder / name, text)
        click.echo(folder / name)
    click.echo(f"next: sbatch {folder / 'job.sbatch'} (add account and partition)", err=True)
