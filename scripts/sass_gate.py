"""Instructions that each kernel must have: 16-byte accesses, tensor cores, asynchronous copies.

    python scripts/sass_gate.py            # compare with cpp/src/cuda/sass.toml: exit 0 or 1
    python scripts/sass_gate.py --all      # also of the products that take long to compile
    python scripts/sass_gate.py --counts   # what every kernel has, to write expectations from

Compiles as ptxas_table.py does and disassembles with nvdisasm (of a toolkit, or of the wheel
nvidia-cuda-nvdisasm). Needs no GPU. A kernel without an expectation fails, and so does an
expectation that no kernel meets.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from cubins import ROOT, Cubin, MissingTool, compiled, cuda_tool, left_out
from ptxas_table import short_names

EXPECTATIONS = ROOT / "cpp/src/cuda/sass.toml"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)")
# Local memory: an array indexed at run time, or a spill, which ptxas_table.py judges.
LOCAL = ("LDL", "STL")


def instructions(listing: str) -> dict[str, Counter[str]]:
    """Instructions of each symbol of ``nvdisasm -c``, counted."""
    found: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in listing.splitlines():
        if line.startswith(".text.") and line.endswith(":"):
            current = found.setdefault(line.removeprefix(".text.")[:-1], Counter())
        elif (match := INSTRUCTION.match(line)) and match[1] != "NOP":
            current[match[1]] += 1
    return found


def count(of: Counter[str], pattern: str) -> int:
    """Instructions of the pattern's opcode that have all of its modifiers: LDG.128 is LDG.E.128."""
    opcode, *modifiers = pattern.split(".")
    total = 0
    for name, times in of.items():
        found, *has = name.split(".")
        if found == opcode and set(modifiers) <= set(has):
            total += times
    return total


def is_wide(kernel: str) -> bool:
    """Whether an instance accesses 16 bytes at once: ``k<float, 4>``, ``k<__half, 8, true>``."""
    width = re.search(r"<[^<>]*?, (\d+)[,>]", kernel)
    return width is not None and int(width[1]) >= 4


def expected(kernel: str, architecture: str, entry: dict[str, Any]) -> dict[str, int]:
    """Instruction → least count for this instance."""
    wanted: dict[str, int] = dict(entry.get("every", {}))
    if is_wide(kernel):
        wanted |= entry.get("wide", {})
    return wanted | entry.get(architecture, {})


def shortfalls(
    kernels: dict[tuple[str, str], Counter[str]], expectations: dict[str, Any]
) -> list[str]:
    """What does not hold, a line each. ``kernels`` by (architecture, name)."""
    found: list[str] = []
    seen: set[str] = set()
    for (architecture, kernel), has in kernels.items():
        base = re.split("[< ]", kernel)[0]
        seen.add(base)
        entry = expectations.get(base)
        if entry is None:
            found.append(f"{architecture} {kernel}: sass.toml expects nothing of it")
            continue
        for pattern, least in expected(kernel, architecture, entry).items():
            if (times := count(has, pattern)) < least:
                found.append(f"{architecture} {kernel}: {times} {pattern}, expected {least}")
        allowed = entry.get("local_memory", "")
        if not allowed and (local := sum(count(has, opcode) for opcode in LOCAL)):
            found.append(f"{architecture} {kernel}: {local} accesses to local memory")
    return found + [
        f"{name}: sass.toml expects it, and there is none"
        for name in sorted(expectations.keys() - seen)
    ]


def disassembled(nvdisasm: str, cubin: Cubin) -> dict[tuple[str, str], Counter[str]]:
    done = subprocess.run(
        [nvdisasm, "-c", str(cubin.path)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{cubin.path.name}: {done.stderr.strip()}")
    found = instructions(done.stdout)
    names = short_names(list(found), cubin) if found else {}
    return {(cubin.architecture, names[symbol]): counts for symbol, counts in found.items()}


def measure(cubins: list[Cubin]) -> dict[tuple[str, str], Counter[str]]:
    """By (architecture, name). Raises MissingTool."""
    nvdisasm = cuda_tool("nvdisasm", "NVDISASM")
    if nvdisasm is None:
        raise MissingTool("no nvdisasm", "pip install 'nvidia-cuda-nvdisasm>=13,<14'")
    found: dict[tuple[str, str], Counter[str]] = {}
    with ThreadPoolExecutor(max_workers=2) as pool:
        for kernels in pool.map(lambda cubin: disassembled(nvdisasm, cubin), cubins):
            found |= kernels
    return found


def print_counts(kernels: dict[tuple[str, str], Counter[str]]) -> None:
    shown = ("LDG", "STG", "LDGSTS", "LDSM", "HMMA", "HGMMA", "UTMALDG", "STSM", *LOCAL)
    for (architecture, kernel), has in sorted(kernels.items()):
        text = ", ".join(
            f"{times} {name}" for name, times in sorted(has.items()) if name.split(".")[0] in shown
        )
        print(f"{architecture} {kernel}: {text}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--counts", action="store_true", help="print what every kernel has")
    parser.add_argument("--all", action="store_true", help="every product")
    arguments = parser.parse_args()
    try:
        cubins = compiled(arguments.all)
        kernels = measure(cubins)
    except MissingTool as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:
        print(f"error: {error.cmd[-1]} does not compile\n{error.stderr}", file=sys.stderr)
        return 1
    if arguments.counts:
        print_counts(kernels)
        return 0
    expectations = tomllib.loads(EXPECTATIONS.read_text())
    if absent := left_out(cubins):
        print(f"note: not compiled: {', '.join(sorted(absent))}", file=sys.stderr)
        expectations = {k: e for k, e in expectations.items() if k not in absent}
    found = shortfalls(kernels, expectations)
    print("\n".join(found) if found else f"{len(kernels)} kernels have what sass.toml expects")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
