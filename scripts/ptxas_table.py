"""Registers, shared memory and spills of every CUDA kernel, as ptxas reports them.

    python scripts/ptxas_table.py --check    # compare with cpp/src/cuda/ptxas.toml: exit 0 or 1
    python scripts/ptxas_table.py --check --all    # also of the products that take long to compile
    python scripts/ptxas_table.py --write    # write that file, but for its table of allowed spills

Needs nvcc but no GPU. Spills that are not allowed and ptxas warnings (C7510 among them) are errors
with any version of nvcc; register counts are compared only with the version that the table was
written by. It names what it leaves out: the products without CUTLASS, the slow ones without --all.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from typing import Any

from cubins import (
    ARCHITECTURES,
    ROOT,
    Cubin,
    MissingTool,
    compiled,
    cutlass_source,
    instance,
    left_out,
    nvcc_command,
    nvcc_release,
)

TABLE = ROOT / "cpp/src/cuda/ptxas.toml"
Table = dict[str, dict[str, "Kernel"]]  # by architecture and name


@dataclass(frozen=True)
class Kernel:
    registers: int
    shared_bytes: int
    spill_bytes: int


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


def short_names(symbols: list[str], cubin: Cubin) -> dict[str, str]:
    """``rmsnorm_fwd_kernel<float, 4>`` for the symbol of that kernel, by symbol.

    CUTLASS's kernels have names of a page and are called by their file: ``linear_bias_bf16``."""
    command = ["c++filt", *symbols]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = {}
    for symbol, full in zip(symbols, text.splitlines(), strict=True):
        if symbol.startswith("_ZN7cutlass"):
            base = instance(cubin.source)
            number = sum(name.startswith(base) for name in found.values())
            found[symbol] = base + (f" {number + 1}" if number else "")
            continue
        without_casts = re.sub(r"\([\w:]+\)(?=\d)", "", full)  # of enumerators, as (E)0
        name = re.sub(r"^void ", "", without_casts).replace("(anonymous namespace)::", "")
        found[symbol] = name.partition("(")[0].replace("fastllm::cuda::", "").replace("gemm::", "")
    return found


def measure(cubins: list[Cubin]) -> Table:
    table: Table = {architecture: {} for architecture in ARCHITECTURES}
    for cubin in cubins:
        kernels = parse(cubin.log)
        names = short_names(list(kernels), cubin)
        table[cubin.architecture] |= {names[symbol]: k for symbol, k in kernels.items()}
    return {architecture: kernels for architecture, kernels in table.items() if kernels}


def to_toml(release: str, table: Table, spills: dict[str, str]) -> str:
    lines = ["# Written by scripts/ptxas_table.py --write.", f'nvcc = "{release}"', ""]
    lines += ["# Spills that are allowed, with the reason.", "[spills]"]
    lines += [f'"{kernel}" = "{reason}"' for kernel, reason in sorted(spills.items())]
    for arch, kernels in table.items():
        lines += ["", f"[{arch}]"]
        lines += [
            f'"{name}" = {{ registers = {k.registers}, shared_bytes = {k.shared_bytes} }}'
            for name, k in sorted(kernels.items())
        ]
    return "\n".join(lines) + "\n"


def differences(release: str, table: Table, committed: dict[str, Any]) -> list[str]:
    """What does not hold, a line each. Architectures that ``table`` lacks are not compared."""
    allowed: dict[str, str] = committed.get("spills", {})
    spilling = {
        f"{arch} {name}": kernel.spill_bytes
        for arch, kernels in table.items()
        for name, kernel in kernels.items()
        if kernel.spill_bytes
    }
    found = [f"{key}: {n} bytes of spills" for key, n in spilling.items() if key not in allowed]
    if committed["nvcc"] != release:
        return found
    found += [f"{key}: spills are allowed, and it has none" for key in allowed.keys() - spilling]
    for arch, kernels in table.items():
        expected: dict[str, dict[str, int]] = committed.get(arch, {})
        for name in sorted(kernels.keys() | expected.keys()):
            now = kernels.get(name)
            was = expected.get(name)
            measured = now and {"registers": now.registers, "shared_bytes": now.shared_bytes}
            if measured != was:
                found.append(f"{arch} {name}: {measured}, the table has {was}")
    return found


def without(committed: dict[str, Any], absent: set[str]) -> dict[str, Any]:
    """The table less the products' kernels of these names."""

    def kept(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        # Of a spill, the architecture is before the name.
        return {k: v for k, v in value.items() if absent.isdisjoint(k.split(" "))}

    return {key: kept(value) for key, value in committed.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the committed table")
    action.add_argument("--write", action="store_true", help="write the table")
    parser.add_argument("--all", action="store_true", help="every product; --write always does")
    arguments = parser.parse_args()
    try:
        release = nvcc_release(nvcc_command())
        cubins = compiled(arguments.all or arguments.write)
    except MissingTool as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd[-1]} does not compile\n{error.stderr}", file=sys.stderr)
        return 1
    committed: dict[str, Any] = tomllib.loads(TABLE.read_text())
    if arguments.write and cutlass_source() is None:
        print("error: no CUTLASS\nhint: pip install nvidia-cutlass", file=sys.stderr)
        return 2
    if absent := left_out(cubins):
        print(f"note: not compiled: {', '.join(sorted(absent))}", file=sys.stderr)
        committed = without(committed, absent)
    try:
        table = measure(cubins)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if arguments.write:
        TABLE.write_text(to_toml(release, table, committed.get("spills", {})))
        print(f"{TABLE.relative_to(ROOT)}: {sum(map(len, table.values()))} kernels")
        committed = tomllib.loads(TABLE.read_text())
    found = differences(release, table, committed)
    count = sum(map(len, table.values()))
    print("\n".join(found) if found else f"nvcc {release}: the table holds, {count} kernels")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
