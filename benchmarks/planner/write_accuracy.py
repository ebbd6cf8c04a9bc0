"""Write ``accuracy.toml``: what ``validate`` says of published runs, for the report page.

python benchmarks/planner/write_accuracy.py ../shared/data/published_runs.csv
"""

from __future__ import annotations

import sys
from pathlib import Path

from fastllm_planner.validate import Errors, report
from fastllm_planner.validate_rows import read_rows

TARGET = Path(__file__).resolve().parents[2] / (
    "packages/fastllm-planner/src/fastllm_planner/accuracy.toml"
)


HEAD = """\
# Written by benchmarks/planner/write_accuracy.py; do not edit. Absolute relative errors of
# predictions of published runs, each series predicted by profiles fitted on the others.
"""


def table(kind: str, name: str, errors: Errors) -> str:
    return (
        f'[[{kind}]]\nseries = "{name}"\nrows = {errors.rows}\n'
        f"median_pct = {100 * errors.median:.1f}\n"
        f"within_20_pct = {100 * errors.within_20:.1f}\n"
    )


def main(csv: Path) -> None:
    rows, _ = read_rows(csv)
    found = report(rows)
    parts = [HEAD]
    parts += [table("time", name, errors) for name, errors in found.time.items()]
    parts += [table("memory", name, errors) for name, errors in found.memory.items()]
    TARGET.write_text("\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
