"""``report``: a plan as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastllm_planner.cli.job_options import build_job, job_options
from fastllm_planner.cli.options import WHOLE, verb

EXAMPLE = "fastllm-planner report --model llama-3-8b --gpu H100-SXM --gpus 64 --out plan.html"


@verb("report", EXAMPLE)
@job_options
@click.option("--top-k", type=WHOLE, default=5, show_default=True, help="Strategies to list.")
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="HTML to write."
)
def command(top_k: int, out: Path, **options: Any) -> int:
    """Write a plan as one self-contained HTML page."""
    from fastllm_planner.emit import write_text
    from fastllm_planner.report import answer, render_page

    job = build_job(options)
    found = answer(job, model=options["model"], top_k=top_k)
    write_text(out, render_page(found))
    click.echo(found.sentence)
    click.echo(f"wrote {out}", err=True)
    return 0 if found.plans else 1
