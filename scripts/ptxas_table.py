"""Registers, shared memory and spills of every CUDA kernel, as ptxas reports them.

    python scripts/ptxas_table.py --check    # compare with cpp/src/cuda/ptxas.toml: exit 0 or 1
    python scripts/ptxas_table.py --write    # write that file

Needs nvcc (on PATH, or named by CUDACXX) but no GPU. Spills and ptxas warnings are errors with any
version of nvcc; register counts are compared only with the version that the table was written by.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "cpp/src/cuda/ptxas.toml"
ARCHITECTURES = ("sm_80", "sm_90")


@dataclass(frozen=True)
class Kernel:
    registers: int
    shared_bytes: int
    spill_bytes: int


def nvcc_command() -> str | None:
    return os.environ.get("CUDACXX") or shutil.which("nvcc")


def nvcc_release(nvcc: str) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    if match is None:
        raise ValueError(f"{nvcc} --version names no release")
    return match[1]


def ptxas_log(nvcc: str, source: Path, architecture: str) -> str:
    """What ptxas -v says about a source file. Raises CalledProcessError if it does not compile."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            nvcc, "-std=c++17", "-O3", f"-arch={architecture}", "-Xptxas", "-v",
            f"-I{ROOT / 'cpp/include'}", "-cubin", "-o", f"{folder}/out.cubin", str(source),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stderr


def short_name(mangled: str) -> str:
    """``rmsnorm_fwd_kernel<float, 4>`` for the symbol of that kernel."""
    full = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout
    without_casts = re.sub(r"\([\w:]+\)(?=\d)", "", full.strip())  # of enumerators, as (E)0
    name = re.sub(r"^void ", "", without_casts).partition("(")[0]
    return name.replace("fastllm::cuda::", "")


def parse(log: str) -> dict[str, Kernel]:
    """Kernels of a ptxas -v log. Raises ValueError for a warning, or a log of another form."""
    kernels: dict[str, Kernel] = {}
    name: str | None = None
    spills = 0
    for line in log.splitlines():
        if "warning" in line.lower():
            raise ValueError(line.strip())
        if match := re.search(r"Compiling entry function '(\w+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            if name is None:
                raise ValueError(f"ptxas names no kernel before: {line.strip()}")
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[name] = Kernel(int(match[1]), int(shared[1]) if shared else 0, spills)
            name, spills = None, 0
    return kernels


def measure(nvcc: str) -> dict[str, dict[str, Kernel]]:
    """Kernels by architecture and name, of every file in cpp/src/cuda."""
    sources = sorted((ROOT / "cpp/src/cuda").glob("*.cu"))
    jobs = [(arch, source) for arch in ARCHITECTURES for source in sources]
    with ThreadPoolExecutor(max_workers=2) as pool:
        logs = list(pool.map(lambda job: ptxas_log(nvcc, job[1], job[0]), jobs))
    table: dict[str, dict[str, Kernel]] = {arch: {} for arch in ARCHITECTURES}
    for (arch, _), log in zip(jobs, logs, strict=True):
        for mangled, kernel in parse(log).items():
            table[arch][short_name(mangled)] = kernel
    return table


def to_toml(release: str, table: dict[str, dict[str, Kernel]]) -> str:
    lines = ["# Written by scripts/ptxas_table.py --write.", f'nvcc = "{release}"']
    for arch, kernels in table.items():
        lines += ["", f"[{arch}]"]
        lines += [
            f'"{name}" = {{ registers = {k.registers}, shared_bytes = {k.shared_bytes} }}'
            for name, k in sorted(kernels.items())
        ]
    return "\n".join(lines) + "\n"


def differences(
    release: str, table: dict[str, dict[str, Kernel]], committed: dict[str, object]
) -> list[str]:
    found = [
        f"{arch} {name}: {kernel.spill_bytes} bytes of spills"
        for arch, kernels in table.items()
        for name, kernel in kernels.items()
        if kernel.spill_bytes
    ]
    if committed["nvcc"] != release:
        return found
    for arch, kernels in table.items():
        expected = committed.get(arch, {})
        assert isinstance(expected, dict)
        for name in sorted(kernels.keys() | expected.keys()):
            now = kernels.get(name)
            was = expected.get(name)
            measured = now and {"registers": now.registers, "shared_bytes": now.shared_bytes}
            if measured != was:
                found.append(f"{arch} {name}: {measured}, the table has {was}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the committed table")
    action.add_argument("--write", action="store_true", help="write the table")
    arguments = parser.parse_args()
    nvcc = nvcc_command()
    if nvcc is None:
        print("error: no nvcc on PATH", file=sys.stderr)
        return 2
    release = nvcc_release(nvcc)
    table = measure(nvcc)
    if arguments.write:
        TABLE.write_text(to_toml(release, table))
        print(f"{TABLE.relative_to(ROOT)}: {sum(map(len, table.values()))} kernels")
        committed: dict[str, object] = tomllib.loads(TABLE.read_text())
    else:
        committed = tomllib.loads(TABLE.read_text())
    found = differences(release, table, committed)
    print("\n".join(found) if found else f"nvcc {release}: the table holds, no spills")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
