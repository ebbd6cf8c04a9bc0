"""``fastllm-convert``: the console script, and ``python -m fastllm_convert``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import click

from fastllm_convert import __version__
from fastllm_convert.errors import UserError

_HELP = """Convert model checkpoints: Hugging Face, Meta, Megatron-LM, DeepSpeed.

\b
Example:
  fastllm-convert run runs/my/checkpoints my-model-hf --to hf
  fastllm-convert verify my-model-hf other-model-hf

The source's format and family are detected. Nothing in a checkpoint is ever executed.
"""


# Command → where it is; a command is imported when it is asked for (or listed).
_COMMANDS = {
    "run": "run",
    "plan": "plan",
    "inspect": "inspect",
    "verify": "verify",
    "meta-to-hf": "aliases",
    "hf-to-megatron": "aliases",
    "deepspeed-to-megatron": "aliases",
    "deepspeed-to-hf": "aliases",
}


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = _COMMANDS.get(cmd_name)
        if module is None:
            return None
        found = importlib.import_module(f"fastllm_convert.commands.{module}")
        command: click.Command = getattr(found, cmd_name.replace("-", "_"))
        return command


@click.group(cls=_Commands, help=_HELP)
@click.option("--debug", is_flag=True, envvar="FASTLLM_DEBUG", help="Show tracebacks.")
@click.version_option(__version__, prog_name="fastllm-convert")
def cli(debug: bool) -> None:
    del debug  # main() looks at the command line itself: errors may come before parsing


def _wants_traceback(args: Sequence[str]) -> bool:
    """``--debug`` before the verb, or ``FASTLLM_DEBUG=1``."""
    return "--debug" in args[:1] or os.environ.get("FASTLLM_DEBUG", "") not in ("", "0")


def _see_help(args: Sequence[str]) -> str:
    """What to do about an error that has no better advice."""
    command = next((arg for arg in args if arg in _COMMANDS), "")
    return f"see '{' '.join(('fastllm-convert', *([command] if command else []), '--help'))}'"


def _fail(message: str, hint: str, *, trace: bool) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    print(f"hint: {' '.join(hint.split())}", file=sys.stderr)
    if trace:
        import traceback

        traceback.print_exc()
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 yes, 1 no, 2 bad input, 130 interrupted)."""
    # numpy starts a thread per core for linear algebra, which nothing here does.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    args = list(sys.argv[1:] if argv is None else argv)
    trace = _wants_traceback(args)
    try:
        status = cli.main(args=args, prog_name="fastllm-convert", standalone_mode=False)
    except UserError as error:
        return _fail(error.message, error.hint or _see_help(args), trace=trace)
    except click.exceptions.Abort:
        return 130
    except KeyboardInterrupt:
        return 130
    except click.ClickException as error:
        hint = "fastllm-convert --help lists the commands"
        return _fail(error.format_message(), hint, trace=trace)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {error}"
        return _fail(message, "run again with --debug for the traceback", trace=trace)
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
