"""Write ``efficiency.toml``: what each published series says about each (device, backend).

python benchmarks/planner/fit_efficiency.py ../shared/data/published_runs.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

import fastllm_planner
from fastllm_planner.validate import cells_of
from fastllm_planner.validate_rows import read_rows

HEADER = """\
# Written by benchmarks/planner/fit_efficiency.py; do not edit. One cell per published series,
# device and backend: the median over its rows of log(measured / predicted without any factor).
"""


def cells_text(table: Path) -> str:
    """The file's text for the complete rows of ``table``."""
    rows, _ = read_rows(table)
    parts = [HEADER]
    for cell in sorted(cells_of(rows), key=lambda c: (c.series, c.gpu, c.backend)):
        parts.append(
            f'\n[[cell]]\nseries = "{cell.series}"\ngpu = "{cell.gpu}"\n'
            f'backend = "{cell.backend}"\nrows = {cell.rows}\nlog_ratio = {cell.log_ratio:.4f}\n'
        )
    return "".join(parts)


def main() -> None:
    target = Path(fastllm_planner.__file__).parent / "efficiency.toml"
    target.write_text(cells_text(Path(sys.argv[1])), encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
