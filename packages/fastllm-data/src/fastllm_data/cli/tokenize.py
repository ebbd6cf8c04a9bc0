"""``fastllm-data tokenize``."""

from __future__ import annotations

import os
from pathlib import Path

import click

from fastllm_data.cli.app import ExampleCommand, print_json


@click.command(
    cls=ExampleCommand,
    example="fastllm-data tokenize c.jsonl --tokenizer t.model --append-eod --out data/c",
)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="Tokenizer file.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output prefix.")
@click.option(
    "--key",
    "keys",
    multiple=True,
    default=("text",),
    show_default=True,
    help="JSON field to read; repeat for several datasets.",
)
@click.option("--append-eod", is_flag=True, help="End each document with the end-of-document id.")
@click.option("--add-bos", is_flag=True, help="Start each sequence with the BOS id.")
@click.option("--merges", type=click.Path(path_type=Path), help="merges.txt of a vocab.json.")
@click.option(
    "--parse-special/--no-parse-special",
    default=None,
    help="Whether '</s>' in text is a special id.  [default: as the reference library]",
)
@click.option(
    "--empty-doc",
    type=click.Choice(["boundary", "skip", "eod"]),
    default="boundary",
    show_default=True,
    help="What a text without tokens becomes.",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip", "quarantine"]),
    default="stop",
    show_default=True,
    help="What to do with a bad line.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    default=lambda: os.cpu_count() or 1,
    help="Threads; the output is the same for any number.  [default: all cores]",
)
@click.option(
    "--verify-sample",
    type=click.IntRange(0),
    default=32,
    show_default=True,
    help="Documents per input to compare with the reference tokenizer; 0: none.",
)
@click.option(
    "--encoder",
    type=click.Choice(["auto", "reference"]),
    default="auto",
    show_default=True,
    help="auto: the fast exact encoder where there is one.",
)
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped or killed.")
@click.option(
    "--checkpoint-mb",
    type=click.FloatRange(0, min_open=True),
    default=256.0,
    show_default=True,
    help="Input between points from which --resume can go on.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    inputs: tuple[str, ...],
    tokenizer: Path,
    out: Path,
    keys: tuple[str, ...],
    append_eod: bool,
    add_bos: bool,
    merges: Path | None,
    parse_special: bool | None,
    empty_doc: str,
    on_error: str,
    workers: int,
    verify_sample: int,
    encoder: str,
    resume: bool,
    checkpoint_mb: float,
    force: bool,
    as_json: bool,
) -> None:
    """Turn JSONL into a Megatron dataset (.bin, .idx).

    Writes OUT_KEY_document.bin, .idx and .meta.json for each key, byte for byte what Megatron-LM's
    preprocess_data.py writes. Nothing appears under those names before all of it is complete.
    """
    from fastllm_data.tokenize import TokenizeOptions, tokenize

    options = TokenizeOptions(
        inputs=inputs,
        tokenizer=tokenizer,
        out=out,
        keys=keys,
        append_eod=append_eod,
        add_bos=add_bos,
        merges=merges,
        parse_special=parse_special,
        empty_doc=empty_doc,
        on_error=on_error,
        workers=workers,
        verify_sample=verify_sample,
        reference_only=encoder == "reference",
        resume=resume,
        checkpoint_bytes=max(1, int(checkpoint_mb * (1 << 20))),
        force=force,
    )
    summary = tokenize(options)
    if as_json:
        print_json(summary.to_dict())
    else:
        click.echo(summary.to_text())
