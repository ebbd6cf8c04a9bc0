"""``fastllm-data preprocess``: tokenize, spelt as Megatron's preprocess_data.py is."""

from __future__ import annotations

from pathlib import Path

import click

from fastllm_data.cli.app import ExampleCommand

SENTENCEPIECE = ("GPTSentencePieceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer")
HUGGING_FACE = ("HFTokenizer", "HuggingFaceTokenizer")
TYPES = ("GPT2BPETokenizer", *SENTENCEPIECE, *HUGGING_FACE, "TikTokenizer")


@click.command(
    cls=ExampleCommand,
    example="fastllm-data preprocess --input c.jsonl --output-prefix data/c "
    "--tokenizer-type TYPE ...",
)
@click.option("--input", "source", required=True, help="JSONL file or glob.")
@click.option("--output-prefix", required=True, type=click.Path(path_type=Path))
@click.option("--json-keys", default="text", show_default=True, help="Fields, separated by spaces.")
@click.option(
    "--tokenizer-type",
    required=True,
    type=click.Choice(TYPES),
    metavar="TYPE",
    help=", ".join(TYPES),
)
@click.option("--vocab-file", type=click.Path(path_type=Path), help="GPT-2's vocab.json.")
@click.option("--merge-file", type=click.Path(path_type=Path), help="GPT-2's merges.txt.")
@click.option("--tokenizer-model", type=click.Path(path_type=Path))
@click.option("--dataset-impl", type=click.Choice(["mmap"]), default="mmap")
@click.option("--append-eod", is_flag=True)
@click.option("--workers", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--log-interval", type=int, default=1000, hidden=True)
@click.option("--partitions", type=int, default=1, hidden=True)
@click.option("--force", is_flag=True, help="Replace an existing output.")
def command(
    source: str,
    output_prefix: Path,
    json_keys: str,
    tokenizer_type: str,
    vocab_file: Path | None,
    merge_file: Path | None,
    tokenizer_model: Path | None,
    dataset_impl: str,
    append_eod: bool,
    workers: int,
    log_interval: int,
    partitions: int,
    force: bool,
) -> None:
    """Tokenize, with Megatron's preprocess_data.py options.

    The same files as `fastllm-data tokenize` writes; --workers are threads here.
    """
    del dataset_impl, log_interval, partitions  # accepted so that existing scripts run
    from fastllm_data.errors import UserError
    from fastllm_data.tokenize import TokenizeOptions, tokenize

    if tokenizer_type == "GPT2BPETokenizer":
        if vocab_file is None or merge_file is None:
            raise UserError("GPT2BPETokenizer needs --vocab-file and --merge-file")
        path, merges = vocab_file, merge_file
    else:
        if tokenizer_model is None:
            raise UserError(f"{tokenizer_type} needs --tokenizer-model")
        path, merges = tokenizer_model, None
    options = TokenizeOptions(
        inputs=(source,),
        tokenizer=path,
        merges=merges,
        out=output_prefix,
        keys=tuple(json_keys.split()),
        append_eod=append_eod,
        workers=workers,
        force=force,
    )
    click.echo(tokenize(options).to_text())
