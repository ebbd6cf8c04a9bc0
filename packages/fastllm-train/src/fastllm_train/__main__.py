"""Entry point of ``fastllm-train`` and ``python -m fastllm_train``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from fastllm_train.cli.app import VERBS, app
from fastllm_train.errors import PeerError, UserError

PROGRAM = "fastllm-train"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 yes, 1 no, 2 bad input, 130 interrupted)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = _debug_wanted(args)
    if debug:
        os.environ["FASTLLM_DEBUG"] = "1"  # the processes that `run` starts inherit it
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
    except PeerError:
        return 2  # the rank where it happened has said what
    except UserError as error:
        if debug:
            raise
        _say("error", _rank_prefix() + str(error), error.hint or _see_help(args))
        return 2
    except Exception as error:
        if debug:
            raise
        text = f"{_rank_prefix()}unexpected {type(error).__name__}: {error}"
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


def _rank_prefix() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f"rank {rank}: "


def _usage_error(error: click.ClickException) -> int:
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    path = ctx.command_path if ctx else PROGRAM
    _say("error", error.format_message().rstrip("."), f"see '{path} --help'")
    return 2


def _see_help(args: Sequence[str]) -> str:
    """What to do about an error that has no better advice."""
    verb = next((arg for arg in args if arg in VERBS), "")
    return f"see '{' '.join((PROGRAM, *([verb] if verb else []), '--help'))}'"


def _say(kind: str, message: str, hint: str = "") -> None:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    red, cyan, end = ("\033[31m", "\033[36m", "\033[0m") if colour else ("", "", "")
    text = f"{red}{kind}:{end} {' '.join(message.split())}\n"
    if hint:
        text += f"{cyan}hint:{end} {' '.join(hint.split())}\n"
    sys.stderr.write(text)  # one write: the ranks of a job share a terminal
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
