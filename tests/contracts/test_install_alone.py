"""Each distribution installs into an empty virtual environment and shows its help there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The siblings that a package's own requirements name: from a checkout they are installed together.
SIBLINGS = {
    "planner": [],
    "convert": ["planner"],
    "data": ["core"],
    "train": ["core", "data", "planner"],
}
# torch takes most of a gigabyte: the trainer is installed with what its --help needs, and its full
# requirement list is what the suite itself runs on.
LIGHT_DEPENDENCIES = {"train": ["click>=8.1,<9"]}


def folder(name: str) -> str:
    return str(ROOT if name == "core" else ROOT / "packages" / f"fastllm-{name}")


def run(
    *command: str | Path, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, env=env
    )


@pytest.fixture(scope="module")
def core_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fastllm-core built once, as pip builds it, without CUDA."""
    out = tmp_path_factory.mktemp("wheel")
    options = ["-C", "cmake.define.FASTLLM_CUDA=OFF", "--no-deps", "-q", "-w", out]
    done = run(sys.executable, "-m", "pip", "wheel", *options, ROOT)
    assert done.returncode == 0, done.stderr
    return next(out.glob("fastllm_core-*.whl"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["planner", "convert", "data", "train"])
def test_installs_alone(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    venv = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", venv).returncode == 0
    python = venv / "bin" / "python"
    targets = [
        str(request.getfixturevalue("core_wheel")) if s == "core" else folder(s)
        for s in SIBLINGS[name]
    ]
    light = LIGHT_DEPENDENCIES.get(name)
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if light:
        done = run(*pip, *light)
        assert done.returncode == 0, done.stderr
        pip.append("--no-deps")
    env = dict(os.environ)
    if name == "planner":
        env["PATH"] = ""  # no compiler, no git, nothing
    done = run(*pip, *targets, folder(name), env=env)
    assert done.returncode == 0, done.stderr
    done = run(venv / "bin" / f"fastllm-{name}", "--help", env={"PATH": "", "LANG": "C.UTF-8"})
    assert done.returncode == 0, done.stderr
    assert f"fastllm-{name}" in done.stdout


@pytest.mark.slow
def test_planner_brings_only_click_and_tabulate(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    assert run(sys.executable, "-m", "venv", venv).returncode == 0
    python = venv / "bin" / "python"
    done = run(python, "-m", "pip", "install", "-q", folder("planner"))
    assert done.returncode == 0, done.stderr
    listed = run(python, "-m", "pip", "list", "--format=freeze").stdout.splitlines()
    names = {line.split("==")[0].lower() for line in listed}
    assert names - {"pip", "setuptools", "wheel"} == {"fastllm-planner", "click", "tabulate"}
    code = (
        "import sys\n"
        "from fastllm_planner.__main__ import main\n"
        "sys.argv = ['fastllm-planner', 'estimate', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as stop:\n    assert stop.code in (0, None), stop.code\n"
        "assert not {'torch', 'numpy'} & set(sys.modules)\n"
    )
    done = run(python, "-c", code)
    assert done.returncode == 0, done.stderr


def test_core_wheel_holds_no_test_code(core_wheel: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(core_wheel, tmp_path, format="zip")
    names = [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()]
    assert any(name.startswith("fastllm_core/_core") for name in names), names
    assert not [name for name in names if "emulator" in name or "test" in name.lower()], names
