"""``fastllm-train report``: the after-training table."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fastllm_train.cli.app import verb


@verb("report", "fastllm-train report runs/quickstart/train --json")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--warm-up",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="First steps after each (re)start that rates leave out.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(run: Path, warm_up: int, as_json: bool) -> None:
    """Tokens/s, TFLOPs by named convention, MFU, memory and loss of the run in folder RUN."""
    from fastllm_train.report import read_report, report_text

    values = read_report(run, warm_up)
    click.echo(json.dumps(values) if as_json else report_text(values))
