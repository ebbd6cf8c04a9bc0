"""``fastllm-data sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastllm_data.cli.app import ExampleCommand, print_json


@click.command(
    cls=ExampleCommand,
    example="fastllm-data sample data/all_text_document --tokens 1000000 --out data/small",
)
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option("--count", type=click.IntRange(1), help="How many documents.")
@click.option("--tokens", type=click.IntRange(1), help="Until there are this many tokens.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output prefix.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    prefix: Path,
    count: int | None,
    tokens: int | None,
    seed: int,
    out: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Draw random documents into a dataset of their own.

    Without replacement, kept in the order of the dataset; the same seed draws the same documents.
    """
    from fastllm_data.errors import UserError
    from fastllm_data.indexed_dataset import IndexedDataset
    from fastllm_data.subset import sample_documents, write_subset

    if (count is None) == (tokens is None):
        raise UserError("give either --count or --tokens")
    dataset = IndexedDataset(prefix)
    if count is not None and count > dataset.documents:
        raise UserError(f"--count {count}: there are {dataset.documents} documents")
    if tokens is not None and tokens > len(dataset.tokens):
        raise UserError(f"--tokens {tokens}: there are {len(dataset.tokens)}")
    ranges = sample_documents(dataset, seed, count=count, tokens=tokens)
    how: dict[str, Any] = {"from": str(prefix), "seed": seed, "count": count, "tokens": tokens}
    made = write_subset(dataset, ranges, out, how=how, force=force)
    result = {
        "output": str(out),
        "documents": made.documents,
        "sequences": len(made),
        "tokens": len(made.tokens),
    }
    if as_json:
        print_json(result)
    else:
        click.echo(f"{out}: {made.documents:,} documents, {len(made.tokens):,} tokens")
