"""Entry point of ``fastllm-data`` and ``python -m fastllm_data``."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import click

from fastllm_data.cli.app import VERBS, app
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
        _say("error", str(error), error.hint or _see_help(args))
        return 2
    except OSError as error:
        if debug:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _say("error", f"{where}{error.strerror or error}", _os_hint(error))
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
    ctx = error.ctx if isinstance(error, click.UsageError) else None
    path = ctx.command_path if ctx else PROGRAM
    _say("error", error.format_message().rstrip("."), f"see '{path} --help'")
    return 2


def _see_help(args: Sequence[str]) -> str:
    """What to do about an error that has no better advice."""
    verb = next((arg for arg in args if arg in VERBS), "")
    return f"see '{' '.join((PROGRAM, *([verb] if verb else []), '--help'))}'"


def _os_hint(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and run it again; tokenize and preprocess go on with --resume"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "check who may read and write there, or give another path"
    return "check the path"


def _say(kind: str, message: str, hint: str = "") -> None:
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    red, cyan, end = ("\033[31m", "\033[36m", "\033[0m") if colour else ("", "", "")
    print(f"{red}{kind}:{end} {' '.join(message.split())}", file=sys.stderr)
    if hint:
        print(f"{cyan}hint:{end} {' '.join(hint.split())}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
