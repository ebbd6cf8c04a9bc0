"""The table of docs/kernels.md is what the tests and the committed tables say today."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import kernel_table  # noqa: E402


def test_the_page_has_todays_table() -> None:
    command = [sys.executable, str(ROOT / "scripts/kernel_table.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_operator_has_a_row() -> None:
    rows = kernel_table.table().splitlines()[2:]
    names = [row.split("`")[1] for row in rows]
    sources = {path.stem for path in (ROOT / "cpp/src/cuda").glob("*.cu")}
    assert set(names) == sources | set(kernel_table.products())


def test_a_test_less_changes_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in kernel_table.TESTS.glob("*.py"):
        text = path.read_text()
        if path.name == "test_glu.py":
            text = text.replace("(counted: Any", "(emulated: Any")
        if path.name == "conftest.py":
            text = text.replace('        "avx512",\n', "")
        (tmp_path / path.name).write_text(text)
    before = row_of("glu")
    monkeypatch.setattr(kernel_table, "TESTS", tmp_path)
    assert before.count("bytes counted") == 2
    assert "AVX-512" in before
    assert "bytes counted" not in row_of("glu")
    assert "AVX-512" not in row_of("glu")


def row_of(operator: str) -> str:
    (row,) = (r for r in kernel_table.table().splitlines() if r.startswith(f"| `{operator}` "))
    return row


def test_a_kernel_without_expectation_is_no_gate() -> None:
    table = {"sm_80": {"glu_fwd_kernel<float, 4, 0>": {}, "glu_bwd_kernel<float, 4, 0>": {}}}
    both = {"glu_fwd_kernel": {}, "glu_bwd_kernel": {}}
    assert kernel_table.architectures("glu", table, both) == ["sm_80"]
    assert kernel_table.architectures("glu", table, {"glu_fwd_kernel": {}}) == []


def test_a_result_names_its_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.json").write_text('{"gpu": "A100", "cases": [{"operator": "glu"}]}')
    monkeypatch.setattr(kernel_table, "RESULTS", tmp_path)
    assert row_of("glu").endswith("| A100 |")
    assert row_of("rope").endswith("| not yet |")


def test_markers_are_needed() -> None:
    with pytest.raises(ValueError, match="markers"):
        kernel_table.with_table("a page", "rows\n")
