"""The command line imports little: click, tabulate and the standard library.

How fast that starts is measured by ``benchmarks/bench_startup.py``.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastllm_planner.cli.app import VERBS, app

ROOT = Path(__file__).resolve().parents[2]
ALLOWED = {"fastllm_planner", "click", "tabulate"}


IMPORTED = """
import sys
before = set(sys.modules)
from fastllm_planner.__main__ import main
main({args!r})
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted(new - set(sys.stdlib_module_names)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("args", "tabulate"),
    [
        (["--help"], False),
        (["plan", "--model", "llama-3-8b", "--gpu", "H100-SXM", "--gpus", "8"], False),
        (["classic", "--model", "llama-3-8b", "--tokens", "1T"], True),
        (["classic", "--model", "llama-3-8b", "--tokens", "1T", "--json"], False),
    ],
)
def test_imports(args: list[str], tabulate: bool) -> None:
    code = IMPORTED.format(args=args)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names = set(eval(done.stderr.splitlines()[-1]))
    # tabulate itself looks for wcwidth and uses it if it happens to be there.
    assert names - ALLOWED - {"wcwidth"} == set()
    assert ("tabulate" in names) == tabulate


def test_declared_dependencies_are_the_two() -> None:
    file = ROOT / "packages" / "fastllm-planner" / "pyproject.toml"
    declared = tomllib.loads(file.read_text(encoding="utf-8"))["project"]["dependencies"]
    assert {name.split(">")[0] for name in declared} == {"click", "tabulate"}


def test_every_verb_is_a_module_with_the_same_help_line() -> None:
    import click

    context = click.Context(app)
    for verb, line in VERBS.items():
        command = app.get_command(context, verb)
        assert command is not None
        assert command.name == verb
        assert command.get_short_help_str(limit=90) == line
