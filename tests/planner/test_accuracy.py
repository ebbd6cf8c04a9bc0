"""The error that the page quotes is the error that ``validate`` measures today."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllm_planner.accuracy import accuracy_sentence, shipped_accuracy
from fastllm_planner.validate import report
from fastllm_planner.validate_rows import read_rows

CSV = Path(__file__).resolve().parents[3] / "shared" / "data" / "published_runs.csv"


@pytest.mark.shared
@pytest.mark.skipif(not CSV.is_file(), reason="../shared is absent")
def test_the_shipped_errors_are_todays() -> None:
    found = report(read_rows(CSV)[0])
    for kind, measured in (("time", found.time), ("memory", found.memory)):
        shipped = {row.series: row for row in shipped_accuracy()[kind]}
        assert set(shipped) == set(measured)
        for series, errors in measured.items():
            assert shipped[series].rows == errors.rows
            assert shipped[series].median_pct == pytest.approx(100 * errors.median, abs=0.06)
            assert shipped[series].within_20_pct == pytest.approx(100 * errors.within_20, abs=0.06)


def test_the_sentence_quotes_the_totals() -> None:
    for rows in shipped_accuracy().values():
        total = next(row for row in rows if row.series == "all")
        assert total.rows == sum(row.rows for row in rows if row.series != "all")
        assert f"{total.rows}" in accuracy_sentence()
        assert f"{total.median_pct:g}%" in accuracy_sentence()
