"""``fastllm-data train-tokenizer``."""

from __future__ import annotations

from pathlib import Path

import click

from fastllm_data.cli.app import ExampleCommand, print_json
from fastllm_data.inputs import FORMATS


@click.command(
    cls=ExampleCommand,
    example="fastllm-data train-tokenizer corpus.jsonl --vocab-size 8192 --out tokenizer/",
)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--vocab-size", type=int, default=8192, show_default=True, help="Number of ids.")
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path),
    help="File ending in .model, or a folder for tokenizer.model.",
)
@click.option("--key", default="text", show_default=True, help="JSON field to read.")
@click.option(
    "--format", "form", type=click.Choice(["auto", *FORMATS]), default="auto", metavar="FORMAT",
    help="What a document is, as for tokenize.",
)  # fmt: skip
@click.option("--max-bytes", type=click.IntRange(1), help="Train on this much text at most.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    inputs: tuple[str, ...],
    vocab_size: int,
    out: Path,
    key: str,
    form: str,
    max_bytes: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Train a SentencePiece BPE tokenizer.

    LLaMA's settings: byte fallback, single digits, no normalization; unk 0, bos 1, eos 2. The same
    text gives the same file.
    """
    from fastllm_data.train_tokenizer import train_tokenizer

    made = train_tokenizer(
        inputs, vocab_size, out, key=key, max_bytes=max_bytes, form=form, force=force
    )
    if as_json:
        print_json(made.to_dict())
        return
    click.echo(
        f"{made.path}: {made.vocab_size} pieces from {made.documents:,} documents, "
        f"{made.text_bytes / 1e6:.1f} MB, in {made.seconds:.1f} s"
    )
