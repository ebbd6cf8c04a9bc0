"""``fastllm-data tokenize-chat``."""

from __future__ import annotations

from pathlib import Path

import click

from fastllm_data.cli.app import ExampleCommand, print_json


@click.command(
    cls=ExampleCommand,
    example="fastllm-data tokenize-chat chats.jsonl --tokenizer llama-3-instruct/ --out data/sft",
)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "--tokenizer",
    required=True,
    type=click.Path(path_type=Path),
    help="A Hugging Face tokenizer's folder (tokenizer.json, tokenizer_config.json).",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output prefix.")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    help="A Jinja file.  [default: the tokenizer's own]",
)
@click.option(
    "--train-on",
    type=click.Choice(["all", "last"]),
    default="all",
    show_default=True,
    help="Which of the assistant's messages are learnt.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "jsonl", "parquet"]),
    default="auto",
    help="Of the inputs.  [default: by name and content]",
)
@click.option(
    "--on-error",
    type=click.Choice(["stop", "skip", "quarantine"]),
    default="stop",
    show_default=True,
    help="What to do with a bad line.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--resume", is_flag=True, help="Go on with a run that was stopped or killed.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    inputs: tuple[str, ...],
    tokenizer: Path,
    out: Path,
    chat_template: Path | None,
    train_on: str,
    form: str,
    on_error: str,
    force: bool,
    resume: bool,
    as_json: bool,
) -> None:
    """Turn chats into tokens and loss masks, for instruction tuning.

    A line is {"messages": [{"role", "content"}, ...]}, or {"prompt", "completion"}. Writes
    OUT_chat_document.bin and .idx, and beside them OUT_chat_mask.bin and .idx: 1 where a token is
    learnt. fastllm_data.ChatDataset packs them into samples.
    """
    from fastllm_data.tokenize_chat import ChatOptions, tokenize_chat

    summary = tokenize_chat(
        ChatOptions(
            inputs=inputs,
            tokenizer=tokenizer,
            out=out,
            template=chat_template,
            train_on=train_on,
            on_error=on_error,
            form=form,
            force=force,
            resume=resume,
        )
    )
    if as_json:
        print_json(summary.to_dict())
    else:
        click.echo(summary.to_text())
