"""Which operator is executed where: the table of docs/kernels.md, from what the repository tests.

    python scripts/kernel_table.py --check    # exit 0 when the page has today's table, else 1
    python scripts/kernel_table.py --write    # rewrite it, between its two markers

CPU and emulators: from the backends that the tests of tests/ops ask for by their fixtures. Machine
code: architectures for which every kernel of the operator is in ptxas.toml and sass.toml expects
something of it. GPU: the names in benchmarks/ops/results/*.json, which `make gpu-check` writes.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs/kernels.md"
TESTS = ROOT / "tests/ops"
CUDA = ROOT / "cpp/src/cuda"
RESULTS = ROOT / "benchmarks/ops/results"
BEGIN, END = "<!-- kernel table: begin -->", "<!-- kernel table: end -->"
CPU_LEVELS = {"portable": "portable", "avx2": "AVX2", "avx512": "AVX-512"}
# Fixtures of conftest.py that stand for one backend.
ONE_BACKEND = {"emulated": "emulated", "emulated_ptx": "ptx", "emulated_gemm_module": "ptx"}


@dataclass
class Fixtures:
    params: dict[str, list[str]] = field(default_factory=dict)
    needs: dict[str, list[str]] = field(default_factory=dict)

    def read(self, tree: ast.Module) -> None:
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef):
                continue
            for decorator in node.decorator_list:
                if "pytest.fixture" in ast.unparse(decorator):
                    self.needs[node.name] = [argument.arg for argument in node.args.args]
                    self.params[node.name] = strings(decorator)

    def backends(self, name: str) -> set[str]:
        """Backends that a test runs on which takes this fixture."""
        if name in ONE_BACKEND:
            return {ONE_BACKEND[name]}
        if self.params.get(name):
            return set(self.params[name])
        return set[str]().union(*(self.backends(n) for n in self.needs.get(name, ())))


def strings(decorator: ast.expr) -> list[str]:
    """Values of ``params`` in a fixture's decorator, those inside pytest.param() too."""
    for keyword in decorator.keywords if isinstance(decorator, ast.Call) else ():
        if keyword.arg == "params":
            nodes = ast.walk(keyword.value)
            return [
                n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)
            ]
    return []


@dataclass
class Tested:
    """Backends on which an operator's values are tested, and those on which bytes are counted."""

    values: set[str] = field(default_factory=set)
    counted: set[str] = field(default_factory=set)


def tested(operators: list[str]) -> dict[str, Tested]:
    """By operator: tests of test_<operator>.py, or named test_<operator>… in another file."""
    common = Fixtures()
    common.read(ast.parse((TESTS / "conftest.py").read_text()))
    found = {operator: Tested() for operator in operators}
    for path in sorted(TESTS.glob("test_*.py")):
        tree = ast.parse(path.read_text())
        fixtures = Fixtures(dict(common.params), dict(common.needs))
        fixtures.read(tree)
        for node in tree.body:
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            operator = owner(path.stem, node.name, operators)
            for argument in node.args.args if operator else ():
                has = (
                    found[operator].counted if argument.arg == "counted" else found[operator].values
                )
                has |= fixtures.backends(argument.arg)
    return found


def owner(file: str, test: str, operators: list[str]) -> str:
    """The operator that a test is of, or an empty string."""
    if file.removeprefix("test_") in operators:
        return file.removeprefix("test_")
    matching = [o for o in operators if re.match(rf"test_{o}(_|$)", test)]
    return max(matching, key=len, default="")


def names_in_cmake() -> list[str]:
    text = (ROOT / "cpp/ops.cmake").read_text()
    match = re.search(r"set\(FASTLLM_OPS\n(.*?)\)", text, re.S)
    if match is None:
        raise ValueError("cpp/ops.cmake sets no FASTLLM_OPS")
    return match[1].split()


def products() -> list[str]:
    """Of cpp/src/cuda/gemm: one file an instance, named for the product and the dtype."""
    stems = {path.stem for path in (CUDA / "gemm").glob("*_bf16.cu")}
    return sorted({re.sub(r"(_sm\d+a?)?_bf16$", "", stem) for stem in stems})


def kernels_of(operator: str, table: dict[str, Any]) -> set[str]:
    """Base names of the operator's kernels: in its .cuh, or instances of the product."""
    header = CUDA / f"{operator}.cuh"
    if header.exists():
        text = "".join(
            (CUDA / name).read_text()
            for name in (header.name, *re.findall(r'#include "(\w+\.cuh)"', header.read_text()))
        )
        return {m[1] for m in re.finditer(r"__global__[^;{]*?(\w+_kernel)\(", text)}
    instance = re.compile(rf"{operator}(_sm\d+a?)?_(bf16|fp16)$")
    names = {
        name.split(" ")[0] for a, rows in table.items() if a.startswith("sm_") for name in rows
    }
    return {name for name in names if instance.match(name)}


def architectures(operator: str, table: dict[str, Any], expectations: dict[str, Any]) -> list[str]:
    kernels = kernels_of(operator, table)
    if not kernels or not kernels <= expectations.keys():
        return []
    found: list[str] = []
    for architecture, rows in table.items():
        here = {re.split("[< ]", name)[0] for name in rows}
        # A product has instances of its own for some architectures.
        fits = kernels & here if operator in products() else kernels <= here
        if architecture.startswith("sm_") and fits:
            found.append(architecture)
    return found


def measured(operator: str) -> list[str]:
    """GPUs of committed results."""
    gpus: set[str] = set()
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        if any(case["operator"] == operator for case in result["cases"]):
            gpus.add(result["gpu"])
    return sorted(gpus)


def emulated(has: Tested, backend: str) -> str:
    if backend not in has.values:
        return "no"
    return "checked, bytes counted" if backend in has.counted else "checked"


def table() -> str:
    registers = tomllib.loads((CUDA / "ptxas.toml").read_text())
    expectations = tomllib.loads((CUDA / "sass.toml").read_text())
    operators = names_in_cmake() + products()
    tests = tested(operators)
    lines = [
        "| op | CPU | CUDA source, emulated | PTX, emulated | machine code | measured on a GPU |",
        "|---|---|---|---|---|---|",
    ]
    for operator in operators:
        has = tests[operator]
        levels = [shown for level, shown in CPU_LEVELS.items() if level in has.values]
        cells = [
            f"`{operator}`",
            ", ".join(levels) or "no",
            emulated(has, "emulated"),
            emulated(has, "ptx"),
            ", ".join(architectures(operator, registers, expectations)) or "no",
            ", ".join(measured(operator)) or "not yet",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_table(page: str, rows: str) -> str:
    """The page with these rows between its markers. Raises ValueError without them."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has not the markers {BEGIN} and {END}")
    return f"{before}{begin}\n{rows}{end}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="compare with the page")
    action.add_argument("--write", action="store_true", help="rewrite the page")
    arguments = parser.parse_args()
    page = PAGE.read_text()
    wanted = with_table(page, table())
    if arguments.write:
        PAGE.write_text(wanted)
    elif page != wanted:
        print(
            "docs/kernels.md is not today's: python scripts/kernel_table.py --write",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
