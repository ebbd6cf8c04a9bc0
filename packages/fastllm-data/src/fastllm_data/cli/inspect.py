"""``fastllm-data inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastllm_data.cli.app import ExampleCommand, print_json


@click.command(
    cls=ExampleCommand,
    example="fastllm-data inspect data/corpus_text_document --tokenizer tokenizer.model",
)
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option(
    "--document", type=click.IntRange(0), default=0, show_default=True, help="The document to show."
)
@click.option(
    "--tokens",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="How many of its tokens to show.",
)
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="To show it as text.  [default: the one it was made with, if it is still there]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    prefix: Path, document: int, tokens: int, tokenizer: Path | None, as_json: bool
) -> None:
    """Say what a dataset holds; show a document."""
    from fastllm_data.errors import UserError
    from fastllm_data.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(prefix)
    result: dict[str, Any] = {
        "prefix": str(prefix),
        "dtype": dataset.dtype.name,
        "documents": dataset.documents,
        "sequences": len(dataset),
        "tokens": len(dataset.tokens),
        "bin_bytes": dataset.tokens.nbytes,
    }
    if dataset.documents:
        if document >= dataset.documents:
            raise UserError(f"document {document}: there are {dataset.documents}, from 0")
        ids = dataset.document(document)
        result["document"] = document
        result["length"] = len(ids)
        result["ids"] = ids[:tokens].tolist()
        path = _recorded_tokenizer(prefix) if tokenizer is None else tokenizer
        if path is not None:
            from fastllm_data.tokenizer import load_tokenizer

            result["text"] = load_tokenizer(path).reference.decode(result["ids"])
    if as_json:
        print_json(result)
        return
    for name, value in result.items():
        click.echo(f"{name:11}{value:,}" if isinstance(value, int) else f"{name:11}{value}")


def _recorded_tokenizer(prefix: Path) -> Path | None:
    """The tokenizer file that the sidecar names, if it is still what it was."""
    from fastllm_data.output import read_sidecar, sha256_file

    meta = read_sidecar(prefix)
    said: dict[str, Any] = {} if meta is None else meta["tokenizer"]
    path = Path(str(said.get("path", "")))
    # Of a vocab.json the recorded hash is that of vocabulary and merges, so it never matches here.
    if path.is_file() and sha256_file(path) == said.get("sha256"):
        return path
    return None
