"""The direction of imports between the distributions (.importlinter), and files' names."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DUMPING_GROUNDS = {"utils", "util", "helpers", "helper", "common", "misc"}


def tracked_files() -> list[Path]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout to list the project's files")
    done = subprocess.run(
        [git, "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(line) for line in done.stdout.splitlines()]


def lint_imports(config: Path) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as run; run()",
    ]
    return subprocess.run(
        [*command, "--config", str(config), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_imports_point_one_way() -> None:
    done = lint_imports(ROOT / ".importlinter")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_broken_direction_is_reported(tmp_path: Path) -> None:
    config = tmp_path / ".importlinter"
    text = (ROOT / ".importlinter").read_text(encoding="utf-8")
    # convert does import arch: forbidding that must be reported, or the check above proves nothing.
    config.write_text(text.replace("    deepspeed\n", "    fastllm_planner.arch\n", 1))
    done = lint_imports(config)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "convert knows only the planner's arch BROKEN" in done.stdout


def test_no_dumping_grounds() -> None:
    bad = [p for p in tracked_files() if p.stem in DUMPING_GROUNDS or DUMPING_GROUNDS & {*p.parts}]
    assert not bad, f"name these for what they hold: {bad}"


def test_arch_needs_only_the_standard_library() -> None:
    code = (
        "import sys; before = set(sys.modules); import fastllm_planner.arch; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names) - {'fastllm_planner'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
