"""The 76 published runs that are in the repository: what guards the model where the table is not.

``benchmarks/planner/published_sample.csv`` takes up to four runs of every (series, device, dtype)
of the full table, and of those that ran out of memory two. The targets are the full table's.
"""

from dataclasses import replace
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


OTHER = SAMPLE.with_name("other_runs.csv")


def test_twelve_further_series() -> None:
    """Runs that are not in the table at all, of stacks and clusters it does not have."""
    rows, skipped = read_rows(OTHER)
    assert not skipped
    found = report(rows)
    assert len({row.series for row in rows}) == 12
    assert found.time["all"].median <= 0.10
    assert found.time["all"].within_20 >= 0.80
    assert found.verdicts["all"].ran_forbidden == 0
    for name in ("torchtitan-h100", "korthikanti2022", "fms", "flagperf-llama3"):
        assert found.time[name].within_20 >= 0.90, name


def test_one_series_that_is_read_wrongly_does_not_spoil_the_others() -> None:
    """A table may hold a series whose batch is not what it says: 3 times too slow throughout."""
    rows, _ = read_rows(OTHER)
    wrong = [
        replace(row, series="wrong", seconds=3 * row.seconds)
        for row in rows
        if row.series == "sc21-table2" and row.seconds
    ]
    before, after = report(rows).time, report([*rows, *wrong]).time
    assert after["korthikanti2022"].median < before["korthikanti2022"].median + 0.04
