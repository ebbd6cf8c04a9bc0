"""The command group: verbs load lazily, so that ``--help`` stays fast."""

from __future__ import annotations

import difflib
import importlib

import click

from fastllm_planner import __version__

# Verb → one-line help. The module is ``fastllm_planner.cli.<verb>``, its command is ``command``;
# the line stands here too so that the group's help imports no verb (a test keeps them equal).
VERBS: dict[str, str] = {
    "plan": "Find the fastest strategy that fits.",
    "estimate": "Memory and time of one given layout.",
    "tflops": "TFLOPs of a finished run, by convention.",
    "calibrate": "Fit this cluster's efficiency from metrics.jsonl.",
    "validate": "Check the predictions against published runs.",
    "classic": "The classic calculator: size, memory, ZeRO, days.",
    "report": "Write a plan as one self-contained HTML page.",
    "serve": "The same page, live on 127.0.0.1.",
    "models": "List the known models, or show one.",
    "gpus": "List the known GPUs.",
}


class ExampleCommand(click.Command):
    """A command whose help starts with an example."""

    example: str = ""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_example(formatter, self.example)
        super().format_help(ctx, formatter)


class VerbGroup(click.Group):
    """Loads ``fastllm_planner.cli.<verb>`` when that verb is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f"fastllm_planner.cli.{cmd_name}").command

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
        write_example(
            formatter, "fastllm-planner plan --model llama-2-70b --gpu H100-SXM --gpus 64"
        )
        super().format_help(ctx, formatter)


def write_example(formatter: click.HelpFormatter, example: str) -> None:
    if example:
        formatter.write(f"Example: {example}\n\n")


@click.group(cls=VerbGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastllm-planner")
@click.option("--debug", is_flag=True, help="Show tracebacks (also FASTLLM_DEBUG=1).")
def app(debug: bool) -> None:
    """What fits, how fast, and with which strategy. Runs on a laptop."""
    del debug  # main() reads it from the arguments, so that parsing errors can honour it
