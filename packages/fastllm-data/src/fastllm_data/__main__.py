"""Entry point of ``fastllm-data`` and ``python -m fastllm_data``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from fastllm_data.cli.app import app
from fastllm_data.errors import UserError

PROGRAM = "fastllm-data"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 yes, 1 no, 2 bad input, 130 interrupted)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = _debug_wanted(args)
    try:
        status = app.main(args=args, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, click.Abort):
        _say("error", "interrupted")
        return 130
    except click.ClickException as error:
        return _usage_error(error)
    except BrokenPipeError:
        # The reader (head, less) closed the pipe: nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        if debug:
            raise
        _say("error", str(error), error.hint)
        return 2
    except Exception as error:
        if debug:
            raise
        text = f"unexpected {type(error).__name__}: {error}"
        _say("error", text, "run again with --debug for the traceback")
        return 2


def _debug_wanted(args: Sequence[str]) -> bool:
    """``--debug`` before the verb, or ``FASTLLM_DEBUG=1``; read early, for errors while parsing."""
    if os.environ.get("FASTLLM_DEBUG", "") not in ("", "0"):
        return True
    for arg in args:
        if not arg.startswith("-"):
            return False
        if arg == "--debug":
            return True
    return False


def _usage_error(error: click.ClickException) -> int:
    hint = ""
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f"see '{error.ctx.command_path} --help'"
    _say("error", error.format_message().rstrip("."), hint)
    return 2


def _say(kind: str, message: str, hint: str = "") -> None:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    red, cyan, end = ("\033[31m", "\033[36m", "\033[0m") if colour else ("", "", "")
    print(f"{red}{kind}:{end} {' '.join(message.split())}", file=sys.stderr)
    if hint:
        print(f"{cyan}hint:{end} {' '.join(hint.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
