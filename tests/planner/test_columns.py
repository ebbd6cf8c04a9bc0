"""Plain tables."""

from __future__ import annotations

from fastllm_planner.columns import columns


def test_numbers_stand_to_the_right() -> None:
    assert columns(["name", "GiB"], [["a", "1.5"], ["longer", "10.25"]]) == (
        "name      GiB\n------  -----\na         1.5\nlonger  10.25"
    )


def test_columns_without_news_are_dropped() -> None:
    rows = [["a", "1", "1"], ["b", "2", "1"]]
    text = columns(["x", "TP", "PP"], rows, drop={"TP": "1", "PP": "1"})
    assert text.splitlines()[0] == "x  TP"


def test_several_columns_to_the_left() -> None:
    text = columns(["a", "word", "n"], [["1", "to", "7"]], left=2)
    assert text.splitlines()[2] == "1  to    7"


def test_no_rows() -> None:
    assert columns(["a", "b"], []) == "a  b\n-  -"
