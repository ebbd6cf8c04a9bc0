"""``fastllm-train report``: the after-training table, and its page of curves."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fastllm_train.cli.app import verb


@verb("report", "fastllm-train report runs/quickstart/train")
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--warm-up",
    type=click.IntRange(0),
    default=5,
    show_default=True,
    help="First steps after each (re)start that rates leave out.",
)
@click.option("--html", type=click.Path(path_type=Path), help="The page; RUN/report.html.")
@click.option("--loss-svg", type=click.Path(path_type=Path), help="The loss curve alone, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def command(
    run: Path, warm_up: int, html: Path | None, loss_svg: Path | None, as_json: bool
) -> None:
    """Tokens/s, TFLOPs by named convention, MFU, memory, loss and slow ranks of the run in folder
    RUN; and one HTML file with its curves (loss, throughput, memory)."""
    from fastllm_train.errors import UserError
    from fastllm_train.report import read_metrics, report, report_text, straggler_text
    from fastllm_train.report_page import loss_chart, report_page
    from fastllm_train.run_folder import RunFolder, write_atomically

    metrics = read_metrics(RunFolder(run).metrics)
    values = report(metrics, warm_up)
    page = html if html is not None else run / "report.html"
    written = {page: report_page(str(run), metrics, values)}
    if loss_svg is not None:
        written[loss_svg] = loss_chart(metrics)
    for path, text in written.items():
        try:
            write_atomically(path, text)
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}", hint="name another place with --html"
            ) from error
    if as_json:
        click.echo(json.dumps(values))
    else:
        click.echo("\n".join(filter(None, (report_text(values), straggler_text(metrics)))))
    click.echo(f"wrote {', '.join(str(path) for path in written)}", err=True)
