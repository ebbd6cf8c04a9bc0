"""``fastllm-data decode``."""

from __future__ import annotations

import json
from pathlib import Path

import click

from fastllm_data.cli.app import ExampleCommand


@click.command(
    cls=ExampleCommand,
    example="fastllm-data decode data/corpus_text_document --tokenizer tokenizer.model --count 2",
)
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="Tokenizer file.")
@click.option(
    "--first", type=click.IntRange(0), default=0, show_default=True, help="First document."
)
@click.option("--count", type=click.IntRange(0), help="How many documents.  [default: all]")
@click.option("--key", default="text", show_default=True, help="JSON field to write.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with all of them.")
def command(
    prefix: Path, tokenizer: Path, first: int, count: int | None, key: str, as_json: bool
) -> None:
    """Print documents of a dataset as text.

    One JSON object a line, to be tokenized again if wanted. The end-of-document id is left out.
    """
    from fastllm_data.indexed_dataset import IndexedDataset
    from fastllm_data.tokenizer import load_tokenizer

    dataset = IndexedDataset(prefix)
    loaded = load_tokenizer(tokenizer)
    last = dataset.documents if count is None else min(dataset.documents, first + count)
    texts: list[str] = []
    for d in range(first, last):
        ids = dataset.document(d).tolist()
        if ids and ids[-1] == loaded.eod_id:
            ids.pop()
        text = loaded.reference.decode(ids)
        if as_json:
            texts.append(text)
        else:
            click.echo(json.dumps({key: text}, ensure_ascii=False))
    if as_json:
        click.echo(json.dumps({"documents": texts}, ensure_ascii=False))
