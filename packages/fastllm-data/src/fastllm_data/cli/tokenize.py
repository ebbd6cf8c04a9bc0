"""``fastllm-data tokenize``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fastllm_data.cli.app import ExampleCommand, print_json
from fastllm_data.inputs import FORMATS

if TYPE_CHECKING:
    from fastllm_data.options import Summary, TokenizeOptions


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
    help="Field to read; repeat for several datasets.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", *FORMATS]),
    default="auto",
    metavar="FORMAT",
    help=f"What a document is: {', '.join(FORMATS)}.  [default: by name and content]",
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
@click.option("--split-sentences", metavar="LANGUAGE", help="A sequence a sentence (NLTK's Punkt).")
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
    help="Threads; the output is the same for any number.  [default: all cores; ray: 1 a shard]",
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
@click.option("--hash-inputs", is_flag=True, help="Record each input's SHA-256.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped or killed.")
@click.option(
    "--checkpoint-mb",
    type=click.FloatRange(0, min_open=True),
    default=256.0,
    show_default=True,
    help="Input between points from which --resume can go on.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray", "slurm"]),
    default="local",
    show_default=True,
    help="Where shards run; slurm: write the job's scripts.",
)
@click.option("--shards", type=click.IntRange(1, 99999), help="Do the work in this many parts.")
@click.option("--shard", type=click.IntRange(0), help="Do only this part, from 0.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    inputs: tuple[str, ...],
    tokenizer: Path,
    out: Path,
    keys: tuple[str, ...],
    form: str,
    append_eod: bool,
    add_bos: bool,
    merges: Path | None,
    parse_special: bool | None,
    empty_doc: str,
    split_sentences: str | None,
    on_error: str,
    workers: int | None,
    verify_sample: int,
    encoder: str,
    hash_inputs: bool,
    resume: bool,
    checkpoint_mb: float,
    engine: str,
    shards: int | None,
    shard: int | None,
    force: bool,
    as_json: bool,
) -> None:
    """Turn text into a Megatron dataset (.bin, .idx).

    Writes OUT_KEY_document.bin, .idx and .meta.json for each key, byte for byte what Megatron-LM's
    preprocess_data.py writes. Nothing appears under those names before all of it is complete.
    """
    from fastllm_data.options import TokenizeOptions

    if workers is None:
        workers = 1 if engine == "ray" else os.cpu_count() or 1
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
        form=form,
        split_sentences=split_sentences,
        hash_inputs=hash_inputs,
    )
    if engine == "slurm":
        _write_slurm(options, shards, shard, as_json)
        return
    summary = _run(options, engine, shards, shard)
    if as_json:
        print_json(summary.to_dict())
    else:
        click.echo(summary.to_text())


def _run(options: TokenizeOptions, engine: str, shards: int | None, shard: int | None) -> Summary:
    from fastllm_data.errors import UserError

    if shard is not None:
        if engine != "local" or shards is None or shard >= shards:
            raise UserError("--shard needs --shards, and to be below it", "--shards 8 --shard 0")
        from fastllm_data.shards import run_shard

        return run_shard(options, shard, shards)
    if engine == "ray":
        from fastllm_data.ray_engine import cluster, default_shards, run_on_ray
        from fastllm_data.shards import prepare, tokenize_in_shards

        prepare(options)  # before the seconds that a cluster takes
        with cluster():
            count = shards or default_shards(options.workers)
            return tokenize_in_shards(options, count, run_on_ray)
    if shards is not None:
        from fastllm_data.shards import run_here, tokenize_in_shards

        return tokenize_in_shards(options, shards, run_here)
    from fastllm_data.tokenize import tokenize

    return tokenize(options)


def _write_slurm(
    options: TokenizeOptions, shards: int | None, shard: int | None, as_json: bool
) -> None:
    from fastllm_data.errors import UserError
    from fastllm_data.slurm_engine import write_scripts

    if shards is None or shard is not None:
        raise UserError("--engine slurm needs --shards and not --shard", "--shards 64")
    submit = write_scripts(options, shards)
    if as_json:
        print_json({"submit": str(submit), "shards": shards})
    else:
        click.echo(f"wrote {submit.parent}/array.sh, join.sh, submit.sh\nnext: {submit}")
