"""The command group: verbs load lazily, so that ``--help`` stays fast."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any

import click

from fastllm_train import __version__

# Verb → one-line help. The module is ``fastllm_train.cli.<verb>`` (``_`` for ``-``), its command
# is ``command``.
VERBS: dict[str, str] = {
    "run": "Train, or go on training, as a config says.",
    "launch": "Train with restarts, or write what a cluster needs.",
    "check": "Check a config and show its layout, without a GPU.",
    "report": "TFLOPs, MFU, throughput and loss of a run.",
    "peak": "Measure this machine's GEMM peak.",
    "import-megatron": "Turn a Megatron launch script into a config.",
}


class ExampleCommand(click.Command):
    """A command whose help starts with an example."""

    example: str = ""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(formatter, self.example)
        super().format_help(ctx, formatter)


class VerbGroup(click.Group):
    """Loads ``fastllm_train.cli.<verb>`` when that verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f"fastllm_train.cli.{cmd_name.replace('-', '_')}").command

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
        write_example(formatter, "fastllm-train run configs/quickstart.toml optim.lr=3e-4")
        super().format_help(ctx, formatter)


def write_example(formatter: click.HelpFormatter, example: str) -> None:
    if example:
        formatter.write(f"Example: {example}\n\n")


def verb(name: str, example: str, **settings: Any) -> Callable[..., ExampleCommand]:
    """Decorator: a command of the group whose help starts with ``example``."""

    def decorate(function: Callable[..., Any]) -> ExampleCommand:
        command = click.command(name, cls=ExampleCommand, **settings)(function)
        command.example = example
        return command

    return decorate


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastllm-train")
@click.option("--debug", is_flag=True, help="Show tracebacks (also FASTLLM_DEBUG=1).")
def app(debug: bool) -> None:
    """Pre-training on DeepSpeed, exact in every layout."""
    del debug  # main() reads it from the arguments, so that parsing errors can honour it
