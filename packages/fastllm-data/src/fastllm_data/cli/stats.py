"""``fastllm-data stats``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastllm_data.cli.app import ExampleCommand, print_json

if TYPE_CHECKING:
    from fastllm_data.statistics import Statistics


@click.command(cls=ExampleCommand, example="fastllm-data stats data/corpus_text_document")
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option("--plot", type=click.Path(path_type=Path), help="Draw the histogram as an SVG file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(prefix: Path, plot: Path | None, as_json: bool) -> None:
    """Count documents and tokens; histogram, entropy.

    unigram_entropy_nats is the loss of the best model that ignores context: a trained one is below.
    """
    from fastllm_data.indexed_dataset import IndexedDataset
    from fastllm_data.statistics import statistics

    result = statistics(IndexedDataset(prefix))
    if plot is not None:
        _draw(result, plot)
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(result.to_text())


def _draw(result: Statistics, path: Path) -> None:
    from fastllm_data.errors import UserError
    from fastllm_data.output import WHERE_TO_WRITE
    from fastllm_data.plot import histogram_svg

    if path.suffix != ".svg":
        raise UserError(f"--plot {path}: only .svg can be drawn", f"--plot {path.stem}.svg")
    try:
        path.write_text(histogram_svg(result), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}", WHERE_TO_WRITE) from error
