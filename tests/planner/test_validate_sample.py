"""The 76 published runs that are in the repository: what guards the model where the table is not.

``benchmarks/planner/published_sample.csv`` takes up to four runs of every (series, device, dtype)
of the full table, and of those that ran out of memory two. The targets are the full table's.
"""

from functools import cache
from pathlib import Path

from fastllm_planner.validate import Report, errors, report
from fastllm_planner.validate_rows import read_rows

SAMPLE = Path(__file__).parents[2] / "benchmarks" / "planner" / "published_sample.csv"


@cache
def sample() -> Report:
    rows, skipped = read_rows(SAMPLE)
    assert not skipped
    assert all(row.backend_named for row in rows)
    return report(rows)


def test_step_time() -> None:
    assert sample().time["all"].rows == 64
    assert sample().time["all"].median <= 0.10
    assert sample().time["all"].within_20 >= 0.80


def test_intervals_hold_what_they_promise() -> None:
    """Four in five measurements fall inside."""
    inside = [p.inside_interval for p in sample().predictions if p.inside_interval is not None]
    assert sum(inside) >= 0.8 * len(inside)


def test_memory() -> None:
    found = [p.memory_error for p in sample().predictions if p.memory_error is not None]
    assert len(found) == 21
    assert errors(found).median <= 0.05


def test_verdicts() -> None:
    verdicts = sample().verdicts["all"]
    assert (verdicts.oom_rejected, verdicts.oom_rows) == (8, 8)
    assert verdicts.ran_rejected == verdicts.ran_forbidden == 0
