"""The command group: verbs load lazily, so that ``--help`` stays fast."""

from __future__ import annotations

import difflib
import importlib
import json
from typing import Any

import click

from fastllm_data import __version__

# Verb → one-line help. The module is ``fastllm_data.cli.<verb>``, its command is ``command``; the
# line stands here too so that the group's help imports no verb (a test keeps them equal).
VERBS: dict[str, str] = {
    "tokenize": "Turn text into a Megatron dataset (.bin, .idx).",
    "preprocess": "Tokenize, with Megatron's preprocess_data.py options.",
    "tokenize-chat": "Turn chats into tokens and loss masks, for instruction tuning.",
    "train-tokenizer": "Train a SentencePiece BPE tokenizer.",
    "inspect": "Say what a dataset holds; show a document.",
    "decode": "Print documents of a dataset as text.",
    "stats": "Count documents and tokens; histogram, entropy.",
    "merge": "Join datasets into one, in the order given.",
    "split": "Cut a dataset into several, documents in order.",
    "sample": "Draw random documents into a dataset of their own.",
    "verify": "Check every byte that can be checked.",
}


class ExampleCommand(click.Command):
    """A command whose help starts with an example."""

    def __init__(self, *args: Any, example: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.example = example

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(f"Example: {self.example}\n\n")
        super().format_help(ctx, formatter)


class VerbGroup(click.Group):
    """Loads ``fastllm_data.cli.<verb>`` when that verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"fastllm_data.cli.{cmd_name.replace('-', '_')}")
        return module.command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in VERBS and not name.startswith("-"):
            near = difflib.get_close_matches(name, VERBS, n=1)
            tail = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(VERBS)}"
            ctx.fail(f"no such command {name!r}{tail}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(
            "Example: fastllm-data tokenize corpus.jsonl --tokenizer tokenizer.model "
            "--out data/corpus\n\n"
        )
        super().format_help(ctx, formatter)


@click.group(
    cls=VerbGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="fastllm-data")
@click.option("--debug", is_flag=True, help="Show tracebacks (also FASTLLM_DEBUG=1).")
def app(debug: bool) -> None:
    """From text to Megatron datasets: every document, exactly, fast."""
    del debug  # main() reads it from the arguments, so that parsing errors can honour it


def print_json(result: dict[str, Any]) -> None:
    """The one object that ``--json`` prints."""
    click.echo(json.dumps(result, ensure_ascii=False, indent=2))
