"""What the docs show of the planner is what it prints today.

A fenced ``console`` block whose first line is ``$ fastllm-planner …`` is run and compared, byte
for byte. ``FASTLLM_UPDATE_DOCS=1 pytest tests/contracts/test_documented_output.py`` rewrites them.
Blocks about this machine (``--gpu cpu``) differ from machine to machine and are left alone.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / name for name in ("README.md", "packages/fastllm-planner/README.md", "docs/planner.md")
]
BLOCK = re.compile(r"^```console\n\$ (fastllm-planner [^\n]+)\n(.*?)^```$", re.M | re.S)


def printed(command: str) -> str:
    """Standard output of a documented command, run without a terminal."""
    words = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, "-m", "fastllm_planner", *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode in (0, 1), done.stderr
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip("\n") + "\n"


def documented(page: Path) -> list[tuple[str, str]]:
    if not page.exists():
        return []
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(command, output) for command, output in found if "--gpu cpu" not in command]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_documented_output_is_todays(page: Path) -> None:
    if os.environ.get("FASTLLM_UPDATE_DOCS"):
        text = page.read_text(encoding="utf-8")
        for command, output in documented(page):
            block = f"```console\n$ {command}\n"
            text = text.replace(f"{block}{output}```", f"{block}{printed(command)}```")
        page.write_text(text, encoding="utf-8")
    for command, output in documented(page):
        assert printed(command) == output, f"{page}: {command}"


def test_the_readme_shows_a_plan() -> None:
    commands = [command for command, _ in documented(PAGES[0])]
    assert any(command.startswith("fastllm-planner plan ") for command in commands)
