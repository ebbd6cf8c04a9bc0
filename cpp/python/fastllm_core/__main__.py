"""``python -m fastllm_core``: what this build of the native core contains."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from fastllm_core import features

_HELP = """\
Example:
  python -m fastllm_core           what was built, for a person
  python -m fastllm_core --json    fastllm_core.features(), for a program

Needs neither torch nor a GPU.
"""


def rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """The lines of the report: what, and with what."""
    if found["cuda"]:
        architectures = ", ".join(f"sm_{a}" for a in found["cuda_archs"])
        cuda = f"{found['cuda_version']}, for {architectures}"
    else:
        cuda = "not built (FASTLLM_CUDA=ON pip install .)"
    cutlass = found["cutlass_version"] or "not built (-C cmake.define.FASTLLM_CUTLASS=ON)"
    compiler = found["compiler"] + (", AddressSanitizer" if found["sanitized"] else "")
    return [
        ("version", found["version"]),
        ("compiler", compiler),
        ("OpenMP", "yes" if found["openmp"] else "no: one thread"),
        ("CPU kernels", f"{', '.join(found['cpu_built'])}; used here: {found['cpu_used']}"),
        ("this CPU", ", ".join(found["cpu_features"]) or "no vector instructions known"),
        ("CUDA kernels", cuda),
        ("CUTLASS GEMMs", cutlass),
    ]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\nhint: {self.prog} --help\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _Parser(
        prog="python -m fastllm_core",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    arguments = parser.parse_args(argv)
    found = features()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in rows(found):
            print(f"{name:<14} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
