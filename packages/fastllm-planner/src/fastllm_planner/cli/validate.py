"""``validate``: the planner's predictions against a table of published runs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fastllm_planner.cli.options import verb
from fastllm_planner.errors import UserError

EXAMPLE = "fastllm-planner validate published_runs.csv"


@verb("validate", EXAMPLE)
@click.argument("table", type=click.Path(path_type=Path), metavar="FILE.csv")
@click.option("--leave-one-out", "series", metavar="SERIES", help="Score only this series.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.svg", help="Scatter.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(table: Path, series: str | None, plot: Path | None, as_json: bool) -> int:
    """Check the predictions against published runs.

    Predicts every complete row of the table; each series is predicted by efficiency profiles that
    were fitted on the other series only.
    """
    from fastllm_planner.validate import report
    from fastllm_planner.validate_rows import read_rows
    from fastllm_planner.validate_text import report_json, report_text

    rows, skipped = read_rows(table)
    names = sorted({row.series for row in rows if row.complete})
    if not names:
        lost = next((row for row in skipped if row.complete), None)
        if lost is not None:
            raise UserError(
                f"{table} has no complete row that can be read",
                hint=f"the first is {lost.id}: {lost.reason}",
            )
        raise UserError(
            f"{table} has no complete row",
            hint="a complete row has complete = 2: architecture, layout, batch and recomputation",
        )
    if series is not None and series not in names:
        raise UserError(f"no complete row of series {series!r}", hint=f"it has {', '.join(names)}")
    result = report(rows, series)
    if plot is not None:
        from fastllm_planner.validate_plot import scatter_svg

        _write(plot, scatter_svg(result))
    if as_json:
        click.echo(json.dumps(report_json(result, skipped), allow_nan=False))
    else:
        click.echo(report_text(result, skipped))
    return 0


def _write(path: Path, text: str) -> None:
    """Write beside the target, then rename: a reader never sees half a file."""
    import os

    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error
