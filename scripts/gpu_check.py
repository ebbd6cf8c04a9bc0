"""Everything that needs an NVIDIA GPU, on the one that is here: build, tests, sanitizer, benchmark.

    python scripts/gpu_check.py [--only build tests sanitizer bench]
    python scripts/gpu_check.py --dry-run    # the same code with the CPU in the GPU's place

Steps: builds fastllm_core for this GPU into the running Python, with the matrix products where
CUTLASS is found; runs `pytest -m gpu`; runs every kernel under compute-sanitizer (memcheck,
racecheck, initcheck); measures, and writes benchmarks/ops/results/<GPU>.json, of which
docs/kernels.md takes its last column. Exit 0: all steps passed; 1: one did not; 2: no GPU, or no
way to build for it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cubins import MissingTool, cuda_tool, cutlass_source, nvcc_command

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/ops/results"
STEPS = ("build", "tests", "sanitizer", "bench")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
GPU_TESTS = "tests/ops/test_gpu.py"
# Of them, what the sanitizer watches: every kernel and product once.
WATCHED = ("-n0", GPU_TESTS, "-k", "test_every")


@dataclass(frozen=True)
class Gpu:
    name: str
    architecture: str  # as CMake names it: 90

    @property
    def file_name(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


def parse_gpu(line: str) -> Gpu:
    """Of a line of nvidia-smi: ``NVIDIA H100 80GB HBM3, 9.0``."""
    name, _, capability = line.rpartition(", ")
    if not re.fullmatch(r"\d+\.\d+", capability.strip()):
        raise MissingTool(f"nvidia-smi says {line.strip()!r}", "update the driver")
    return Gpu(name.strip(), capability.strip().replace(".", ""))


def first_gpu() -> Gpu:
    """Raises MissingTool where there is no driver or no GPU."""
    hint = "on a machine without one, python scripts/gpu_check.py --dry-run"
    smi = shutil.which("nvidia-smi")
    if smi is None:
        raise MissingTool("no NVIDIA GPU: there is no nvidia-smi", hint)
    command = [smi, "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stderr or done.stdout).strip().splitlines() or ["it lists none"]
        raise MissingTool(f"no NVIDIA GPU: nvidia-smi: {reason[0]}", hint)
    return parse_gpu(lines[0])


def require_torch_with_cuda() -> None:
    code = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    if subprocess.run([sys.executable, "-c", code], check=False).returncode != 0:
        raise MissingTool(
            "this torch does not see the GPU",
            "make distclean && make gpu-check TORCH=torch, which takes torch's CUDA build",
        )


def build_command(gpu: Gpu, cutlass: Path | None) -> list[str]:
    defines = [
        "FASTLLM_CUDA=ON",
        f"FASTLLM_CUDA_ARCHITECTURES={gpu.architecture}",
        f"FASTLLM_CUTLASS={'ON' if cutlass and int(gpu.architecture) >= 80 else 'OFF'}",
    ]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    command += ["--force-reinstall", "--no-deps"]
    for define in defines:
        command += ["-C", f"cmake.define.{define}"]
    return [*command, str(ROOT)]


def pytest_command(*more: str) -> list[str]:
    return [sys.executable, *"-m pytest -m gpu -rs -q -p no:cacheprovider".split(), *more]


def sanitizer_commands(program: str) -> list[list[str]]:
    # The exit code is that of the tests, or 86 when anything was reported.
    options = ["--target-processes", "all", "--error-exitcode", "86", "--print-limit", "20"]
    return [[program, "--tool", tool, *options, *pytest_command(*WATCHED)] for tool in SANITIZERS]


def bench_command(device: str, out: Path | None) -> list[str]:
    command = [sys.executable, str(ROOT / "benchmarks/ops/bench_gpu.py"), "--device", device]
    return command if out is None else [*command, "--out", str(out)]


def run(command: list[str], **environment: str) -> bool:
    print("$ " + " ".join(command), file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, check=False, env=os.environ | environment)
    return done.returncode == 0


def sanitized(program: str) -> bool:
    # Without torch's cache every tensor has an allocation of its own, whose ends memcheck knows.
    results = [
        run(command, PYTORCH_NO_CUDA_MEMORY_CACHING="1") for command in sanitizer_commands(program)
    ]
    return all(results)


def steps_on(gpu: Gpu, nvcc: str) -> dict[str, Callable[[], bool]]:
    program = cuda_tool("compute-sanitizer", "COMPUTE_SANITIZER")

    def sanitizer() -> bool:
        if program is None:
            hint = "pip install -r requirements/cuda.txt"
            print(f"error: no compute-sanitizer\nhint: {hint}", file=sys.stderr)
            return False
        return sanitized(program)

    return {
        "build": lambda: run(build_command(gpu, cutlass_source()), CUDACXX=nvcc),
        "tests": lambda: run(pytest_command("tests")),
        "sanitizer": sanitizer,
        "bench": lambda: run(bench_command("cuda", RESULTS / f"{gpu.file_name}.json")),
    }


def dry_steps() -> dict[str, Callable[[], bool]]:
    """The steps' Python with the CPU in the GPU's place: nothing is built, and what the sanitizer
    would watch runs without it."""
    stand_in = {"FASTLLM_GPU_DEVICE": "cpu"}
    others = pytest_command("-n0", GPU_TESTS, "-k", "not test_every")
    return {
        "tests": lambda: run(others, **stand_in),
        "sanitizer": lambda: run(pytest_command(*WATCHED), **stand_in),
        "bench": lambda: run(bench_command("cpu", None)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=STEPS, default=STEPS, metavar="STEP")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, without building")
    arguments = parser.parse_args()
    try:
        if arguments.dry_run:
            name, steps = "dry run on the CPU", dry_steps()
        else:
            gpu = first_gpu()
            require_torch_with_cuda()
            name, steps = f"{gpu.name}, sm_{gpu.architecture}", steps_on(gpu, nvcc_command())
    except MissingTool as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 2
    print(name, file=sys.stderr)
    passed: dict[str, bool] = {}
    for step in (step for step in arguments.only if step in steps):
        start = time.monotonic()
        passed[step] = steps[step]()
        verdict = "passed" if passed[step] else "FAILED"
        print(f"{step}: {verdict} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        if step == "build" and not passed[step]:
            break
    print(f"{name}: " + ", ".join(f"{s} {'ok' if ok else 'FAILED'}" for s, ok in passed.items()))
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
