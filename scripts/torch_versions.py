"""Runs the operators' tests on one wheel of the core under several versions of torch.

    python scripts/torch_versions.py [2.9.1 2.13.0] [--index URL] [--calls]

Builds the wheel once (or takes --wheel), then for each version makes a virtual environment under
build/torch-versions, installs that torch, the same wheel, fastllm-train and fastllm-planner without
what else they need, and runs the CPU part of tests/ops. --calls also measures what a call of an
operator costs there. PyPI's torch for x86-64 is the CUDA build (3 GB with its libraries); --index
names another, such as PyTorch's CPU index. Exit status 0: all versions pass.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build/torch-versions"
VERSIONS = ("2.9.1", "2.13.0")
NEEDED = ("numpy>=1.26,<3", "pytest>=8,<10", "hypothesis>=6.100,<7", "setuptools<82")
# The emulated GPU and the machine code are the same whatever torch there is; the GPU suite trains a
# model, which takes the other packages and what those need.
SELECTED = "not (emulated or ptx or gemm or cuda or bytes_moved or any_schedule)"
IGNORED = ("test_static_gate.py", "test_gpu.py", "test_gpu_check.py")


def build_wheel() -> Path:
    folder = FOLDER / "wheel"
    for old in folder.glob("*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q"]
    options = ["--no-deps", "-C", "cmake.define.FASTLLM_CUDA=OFF", "-w", str(folder), str(ROOT)]
    subprocess.run([*command, *options], check=True)
    (wheel,) = folder.glob("fastllm_core-*.whl")
    return wheel


def make_environment(version: str, wheel: Path, index: str | None) -> Path:
    """The Python of a virtual environment with that torch and the wheel."""
    folder = FOLDER / version
    python = folder / "bin/python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    indexed = ["--index-url", index] if index else []
    subprocess.run([*pip, *indexed, f"torch=={version}"], check=True)
    subprocess.run([*pip, *NEEDED], check=True)
    again = ["--no-deps", "--force-reinstall", str(wheel)]
    # One test sets a model's layer beside the operator: the architecture is the planner's.
    packages = [str(ROOT / f"packages/fastllm-{name}") for name in ("train", "planner")]
    subprocess.run([*pip, *again, *packages], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    parser.add_argument("--wheel", type=Path, help="of fastllm-core; built when not given")
    parser.add_argument("--index", help="where pip finds torch")
    parser.add_argument("--calls", action="store_true", help="also measure the cost of a call")
    arguments = parser.parse_args()
    wheel: Path = arguments.wheel or build_wheel()
    print(f"{wheel.name}  sha256 {hashlib.sha256(wheel.read_bytes()).hexdigest()[:16]}", flush=True)
    failed: list[str] = []
    for version in arguments.versions:
        python = make_environment(version, wheel, arguments.index)
        print(f"--- torch {version}", flush=True)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        tests = [str(python), "-m", "pytest", "-q", "-r", "fE", "tests/ops", "-k", SELECTED]
        tests += [f"--ignore=tests/ops/{name}" for name in IGNORED]
        if subprocess.run(tests, cwd=ROOT, env=environment, check=False).returncode != 0:
            failed.append(version)
        if arguments.calls:
            calls = [str(python), "benchmarks/ops/bench_ops.py", "--calls"]
            subprocess.run(calls, cwd=ROOT, env=environment, check=True)
    if failed:
        print(f"error: tests fail under torch {', '.join(failed)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
