"""``python -m fastllm_core`` and the build's own messages: what was built, what is missing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastllm_core import _core, features
from fastllm_core.__main__ import rows

ROOT = Path(__file__).resolve().parents[2]


def report(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastllm_core", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_json_is_features() -> None:
    done = report("--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == features()


def test_a_line_for_each() -> None:
    done = report()
    assert (done.returncode, done.stderr) == (0, "")
    found = features()
    assert f"version        {found['version']}\n" in done.stdout
    assert f"used here: {_core.cpu_isa()}\n" in done.stdout
    assert set(_core.cpu_isas()) <= set(found["cpu_built"])


@pytest.mark.parametrize("built", [True, False])
def test_cuda_and_cutlass(built: bool) -> None:
    found: dict[str, Any] = features() | {
        "cuda": built,
        "cuda_archs": ["80", "90a"] if built else [],
        "cuda_version": "13.0.88" if built else None,
        "cutlass_version": "4.2.0" if built else None,
    }
    lines = dict(rows(found))
    if built:
        assert lines["CUDA kernels"] == "13.0.88, for sm_80, sm_90a"
        assert lines["CUTLASS GEMMs"] == "4.2.0"
    else:
        assert lines["CUDA kernels"].startswith("not built (")
        assert lines["CUTLASS GEMMs"].startswith("not built (")


def test_without_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from fastllm_core.__main__ import main; main([])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "CUDA kernels" in done.stdout


def test_unknown_option() -> None:
    done = report("--archs")
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error == "error: unrecognized arguments: --archs"
    assert hint.startswith("hint: ")


@pytest.mark.parametrize(
    ("options", "error", "hint"),
    [
        (["-DFASTLLM_CUDA=ON"], "no CUDA compiler was found", "CUDACXX"),
        (
            ["-DFASTLLM_CUDA=OFF", "-DFASTLLM_CUTLASS=ON"],
            "needs the CUDA kernels",
            "FASTLLM_CUDA=ON",
        ),
        (["-DFASTLLM_CUDA=YES"], "FASTLLM_CUDA=YES is none of its values", "AUTO, ON or OFF"),
    ],
    ids=["nvcc", "cutlass", "value"],
)
def test_what_the_build_misses(tmp_path: Path, options: list[str], error: str, hint: str) -> None:
    environment = os.environ | {"CUDACXX": "/nonexistent/nvcc"}
    cmake = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))
    assert cmake is not None, "requirements/test.txt brings cmake"
    command = [cmake, "-S", str(ROOT), "-B", str(tmp_path), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "error: " in message
    assert error in message
    assert hint in message.partition("hint: ")[2]
