"""Running the command, and the reference checkpoints beside the repository."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllm_convert.__main__ import main
from fastllm_planner.arch import ArchSpec

# --import-mode=importlib puts no test folder on the path; these modules share their checkpoints.
sys.path.insert(0, str(Path(__file__).parent))

from sample_checkpoints import Convert, tiny_spec

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def golden() -> Path:
    """Checkpoints written by the peers' own code."""
    folder = ROOT.parent / "shared" / "golden" / "convert"
    if not folder.is_dir():
        pytest.skip("needs ../shared/golden/convert")
    return folder


@pytest.fixture
def convert(monkeypatch: pytest.MonkeyPatch) -> Convert:
    """``fastllm-convert`` as a user calls it, in this process (a start costs 0.3 s)."""
    monkeypatch.delenv("FASTLLM_DEBUG", raising=False)

    def run(*args: str | Path, status: int | None = 0) -> subprocess.CompletedProcess[str]:
        out, err = io.StringIO(), io.StringIO()
        command = [str(a) for a in args]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(command)
        done = subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())
        if status is not None:
            assert done.returncode == status, (done.returncode, done.stdout, done.stderr)
        return done

    return run


@pytest.fixture
def refused(convert: Convert) -> Callable[..., str]:
    """Run, and require exit 2 with one ``error:`` line; returns stderr."""

    def run(*args: str | Path) -> str:
        done = convert(*args, status=2)
        assert done.stdout == ""
        lines = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
        assert len(lines) == 1, done.stderr
        assert "unexpected" not in lines[0] or "unexpected tensor" in lines[0], done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr

    return run


@pytest.fixture
def spec() -> ArchSpec:
    return tiny_spec()
