"""``calibrate``: fit this cluster's efficiency to what runs measured."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fastllm_planner.cli.options import WHOLE, verb
from fastllm_planner.errors import UserError

EXAMPLE = "fastllm-planner calibrate runs/a/metrics.jsonl --gpu H100-SXM --out h100.json"


@verb("calibrate", EXAMPLE)
@click.argument("metrics", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--gpu", metavar="NAME", help="What the runs used.  [default: cpu, if they did]")
@click.option("--gpus-per-node", type=WHOLE, default=8, show_default=True)
@click.option("--backend", default="fastllm", show_default=True, help="What ran.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Profile to write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    metrics: tuple[Path, ...],
    gpu: str | None,
    gpus_per_node: int,
    backend: str,
    out: Path | None,
    as_json: bool,
) -> int:
    """Fit this cluster's efficiency from metrics.jsonl."""
    from dataclasses import asdict

    from fastllm_planner.backends import backend as backend_named
    from fastllm_planner.calibrate import calibrate, read_segments
    from fastllm_planner.emit import write_text
    from fastllm_planner.plan_text import duration, strategy_words
    from fastllm_planner.profile import save_profile

    def note(text: str) -> None:
        click.echo(f"note: {text}", err=True)

    segments = [segment for path in metrics for segment in read_segments(path, note)]
    on_cpu = [segment.device == "cpu" for segment in segments]
    if gpu is not None and any(on_cpu) and not gpu.lower().startswith("cpu"):
        raise UserError(f"--gpu {gpu}, but the run was on the CPU", "leave --gpu away")
    if gpu is not None and gpu.lower().startswith("cpu") and not all(on_cpu):
        raise UserError(f"--gpu {gpu}, but the run was on a GPU", "name the GPU that it used")
    if gpu is None and any(segment.device != "cpu" for segment in segments):
        raise UserError("say what the runs used: --gpu NAME", "'fastllm-planner gpus' lists them")
    found = calibrate(segments, gpu or "cpu", gpus_per_node, backend_named(backend))
    profile = found.profile
    if out is not None:
        write_text(out, save_profile(profile))
        click.echo(f"wrote {out}", err=True)
    if as_json:
        steps = [
            {"measured_s": measured, "before_s": before, "after_s": after}
            for _, measured, before, after in found.rows
        ]
        click.echo(json.dumps({"schema": 1, "profile": asdict(profile), "steps": steps}))
        return 0
    click.echo(
        f"{profile.gpu}, {profile.backend}: compute takes {profile.compute:.2f} and communication "
        f"{profile.communication:.2f} times what the model says, ±{100 * profile.spread:.0f}%."
    )
    for segment, measured, before, after in found.rows:
        click.echo(
            f"  {strategy_words(segment.layout)}: measured {duration(measured)} "
            f"({len(segment.step_seconds)} steps), predicted {duration(before)} before, "
            f"{duration(after)} after"
        )
    return 0
