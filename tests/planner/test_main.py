"""The frame of the command line: errors in one form, tracebacks on request, exit statuses."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from fastllm_planner import __main__ as entry
from fastllm_planner import __version__
from fastllm_planner.cli.app import app
from fastllm_planner.errors import UserError


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make ``models`` raise ``error``."""

    @click.command("models")
    def command() -> None:
        raise error

    monkeypatch.setattr(type(app), "get_command", lambda *_: command)


# What an error without advice of its own ends in.
SEE_HELP = "hint: see 'fastllm-planner models --help'"


@pytest.mark.parametrize(
    ("error", "status", "lines"),
    [
        (
            UserError("no such thing", "try another"),
            2,
            ["error: no such thing", "hint: try another"],
        ),
        (UserError("two\nlines"), 2, ["error: two lines", SEE_HELP]),
        (UserError("red \x1b[31m file"), 2, ["error: red ?[31m file", SEE_HELP]),
        (
            ZeroDivisionError("division by zero"),
            2,
            [
                "error: unexpected ZeroDivisionError: division by zero",
                "hint: run again with --debug for the traceback",
            ],
        ),
        (KeyboardInterrupt(), 130, ["error: interrupted"]),
    ],
    ids=["user", "newline", "escape", "unexpected", "interrupt"],
)
def test_errors_have_one_form(
    error: BaseException,
    status: int,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("FASTLLM_DEBUG", raising=False)
    failing(monkeypatch, error)
    assert entry.main(["models"]) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line for line in captured.err.splitlines() if line] == lines


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_debug_shows_the_traceback(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FASTLLM_DEBUG", raising=False)
    failing(monkeypatch, ZeroDivisionError("why"))
    args = ["--debug", "models"] if how == "flag" else ["models"]
    if how == "environment":
        monkeypatch.setenv("FASTLLM_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        entry.main(args)


def test_no_verb_shows_the_help_and_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main([]) in (0, 2)
    captured = capsys.readouterr()
    assert "Commands:" in captured.out + captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["plam"], "did you mean 'plan'"),
        (["plan", "--modle", "x"], "--modle"),
        (["plan"], "Missing option"),
        (["classic", "--tokens"], "--tokens"),
    ],
)
def test_usage_errors(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry.main(args) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert "hint: see 'fastllm-planner" in captured.err


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m fastllm_planner models | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
