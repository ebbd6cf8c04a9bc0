"""``fastllm-data stats``."""

from __future__ import annotations

from pathlib import Path

import click

from fastllm_data.cli.app import ExampleCommand, print_json


@click.command(cls=ExampleCommand, example="fastllm-data stats data/corpus_text_document")
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(prefix: Path, as_json: bool) -> None:
    """Count documents and tokens; histogram, entropy.

    unigram_entropy_nats is the loss of the best model that ignores context: a trained one is below.
    """
    from fastllm_data.indexed_dataset import IndexedDataset
    from fastllm_data.statistics import statistics

    result = statistics(IndexedDataset(prefix))
    if as_json:
        print_json(result.to_dict())
    else:
        click.echo(result.to_text())
