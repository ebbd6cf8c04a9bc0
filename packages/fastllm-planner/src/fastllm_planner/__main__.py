"""Entry point of ``fastllm-planner`` and ``python -m fastllm_planner``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from fastllm_planner.cli.app import VERBS, app
from fastllm_planner.errors import UserError

PROGRAM = "fastllm-planner"


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
        return _usage_error(error, args)
    except BrokenPipeError:
        # The reader (head, less) closed the pipe: nothing is wrong, and nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        return _report(error, args)


def _report(error: Exception, args: Sequence[str]) -> int:
    """Print an error in the one form they all have; a user's mistake carries its own hint."""
    # Imported here: the package behind it would double the time that --help takes.
    from fastllm_planner.arch.spec import ArchError

    if isinstance(error, UserError | ArchError):
        _say("error", str(error), error.hint or _see_help(args))
    else:
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


def _usage_error(error: click.ClickException, args: Sequence[str]) -> int:
    hint = _see_help(args)
    if isinstance(error, click.UsageError) and error.ctx:
        hint = f"see '{error.ctx.command_path} --help'"
    _say("error", error.format_message().rstrip("."), hint)
    return 2


def _see_help(args: Sequence[str]) -> str:
    """What to do about an error that has no better advice."""
    verb = next((arg for arg in args if arg in VERBS), "")
    return f"see '{' '.join((PROGRAM, *([verb] if verb else []), '--help'))}'"


def _say(kind: str, message: str, hint: str = "") -> None:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    red, cyan, end = ("\033[31m", "\033[36m", "\033[0m") if colour else ("", "", "")
    print(f"{red}{kind}:{end} {_one_line(message)}", file=sys.stderr)
    if hint:
        print(f"{cyan}hint:{end} {_one_line(hint)}", file=sys.stderr)


def _one_line(text: str) -> str:
    """Without line breaks, and without the escape codes that a file's name may carry."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))


if __name__ == "__main__":
    sys.exit(main())
