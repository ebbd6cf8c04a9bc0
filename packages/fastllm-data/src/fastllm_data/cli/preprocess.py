"""``fastllm-data preprocess``: tokenize, spelt as Megatron's preprocess_data.py is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastllm_data.cli.app import ExampleCommand

SENTENCEPIECE = ("GPTSentencePieceTokenizer", "SentencePieceTokenizer", "Llama2Tokenizer")
HUGGING_FACE = ("HFTokenizer", "HuggingFaceTokenizer")
TYPES = ("GPT2BPETokenizer", *SENTENCEPIECE, *HUGGING_FACE, "TikTokenizer")


class MegatronCommand(ExampleCommand):
    """Takes ``--json-keys text title`` as argparse does: all words up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        joined: list[str] = []
        words = iter(args)
        for word in words:
            joined.append(word)
            if word != "--json-keys":
                continue
            keys: list[str] = []
            for key in words:
                if key.startswith("--"):
                    joined += [" ".join(keys), key] if keys else [key]
                    break
                keys.append(key)
            else:
                joined += [" ".join(keys)] if keys else []
        return super().parse_args(ctx, joined)


@click.command(
    cls=MegatronCommand,
    example="fastllm-data preprocess --input c.jsonl --output-prefix data/c "
    "--tokenizer-type TYPE ...",
)
@click.option("--input", "source", required=True, help="JSONL file or glob.")
@click.option("--output-prefix", required=True, type=click.Path(path_type=Path))
@click.option("--json-keys", default="text", show_default=True, metavar="KEY...", help="Fields.")
@click.option(
    "--tokenizer-type",
    required=True,
    type=click.Choice(TYPES),
    metavar="TYPE",
    help=", ".join(TYPES),
)
@click.option("--vocab-file", type=click.Path(path_type=Path), help="GPT-2's vocab.json.")
@click.option("--merge-file", type=click.Path(path_type=Path), help="GPT-2's merges.txt.")
@click.option(
    "--tokenizer-model", type=click.Path(path_type=Path), help="The file, or HF's folder."
)
@click.option("--dataset-impl", type=click.Choice(["mmap"]), default="mmap", show_default=True)
@click.option("--append-eod", is_flag=True, help="End each document with the end-of-document id.")
@click.option("--split-sentences", is_flag=True, help="A sequence a sentence (NLTK's Punkt).")
@click.option("--keep-newlines", is_flag=True, help="Keep white space between sentences.")
@click.option("--lang", default="english", show_default=True, help="Of the sentences.")
@click.option("--workers", type=click.IntRange(1, 1024), default=1, show_default=True)
@click.option("--log-interval", type=int, default=1000, hidden=True)
@click.option("--partitions", type=int, default=1, hidden=True)
@click.option("--keep-sequential-samples", is_flag=True, hidden=True)
@click.option("--vocab-size", type=int, hidden=True)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped or killed.")
def command(**given: Any) -> None:
    """Tokenize, with Megatron's preprocess_data.py options.

    The same files as `fastllm-data tokenize` writes; --workers are threads here. --partitions,
    --log-interval and the like are accepted, as they change nothing.
    """
    from fastllm_data.errors import UserError
    from fastllm_data.options import TokenizeOptions
    from fastllm_data.tokenize import tokenize

    kind: str = given["tokenizer_type"]
    if kind == "GPT2BPETokenizer":
        if given["vocab_file"] is None or given["merge_file"] is None:
            raise UserError("GPT2BPETokenizer needs --vocab-file and --merge-file")
        path, merges = given["vocab_file"], given["merge_file"]
    else:
        if given["tokenizer_model"] is None:
            raise UserError(f"{kind} needs --tokenizer-model")
        path, merges = given["tokenizer_model"], None
    options = TokenizeOptions(
        inputs=(given["source"],),
        tokenizer=path,
        merges=merges,
        out=given["output_prefix"],
        keys=tuple(given["json_keys"].split()),
        append_eod=given["append_eod"],
        workers=given["workers"],
        split_sentences=given["lang"] if given["split_sentences"] else None,
        keep_newlines=given["keep_newlines"],
        force=given["force"],
        resume=given["resume"],
    )
    click.echo(tokenize(options).to_text())
