"""ZeRO 0 to 3 in fp64, through DeepSpeed: loss and every gradient equal the whole model's.

All layouts of up to four processes: ``every_layout.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import double_worker
import pytest
from double_worker import BROKEN
from rank_job import Job, run_jobs
from train_layouts import FAMILIES

SP = {"sequence_parallel": True}
# Every family in these …
OF_EVERY_FAMILY: dict[str, dict[str, Any]] = {
    "dp2 zero1": {"dp": 2, "zero_stage": 1},
    "dp2 zero2": {"dp": 2, "zero_stage": 2},
    "dp2 zero3, full": {"dp": 2, "zero_stage": 3, "recompute": "full"},
    "tp2 dp2 zero3": {"tp": 2, "dp": 2, "zero_stage": 3},
}
# … and single ones.
OTHERS: dict[str, dict[str, Any]] = {
    "llama: dp2 zero0": {"dp": 2, "zero_stage": 0},
    "llama: dp2 zero3": {"dp": 2, "zero_stage": 3},
    "llama: cp2 zero3": {"cp": 2, "zero_stage": 3},
    "mixtral: cp2 zero2": {"cp": 2, "zero_stage": 2},
    "gpt2: pp2 zero2": {"pp": 2, "zero_stage": 2},
    "mixtral: ep2 zero1": {"ep": 2, "dp": 2, "zero_stage": 1},
    "mixtral: ep2 zero2": {"ep": 2, "dp": 2, "zero_stage": 2},
    "llama: tp2 sp dp2 zero2": {"tp": 2, "dp": 2, **SP, "zero_stage": 2},
    "gpt2: pp2 dp2 zero1": {"pp": 2, "dp": 2, "zero_stage": 1},
    "mixtral: ep2 tp2 sp zero2": {"ep": 2, "dp": 2, "tp": 2, **SP, "zero_stage": 2},
}
LAYOUTS = {
    **{
        f"{family}: {name}": layout
        for family in FAMILIES
        for name, layout in OF_EVERY_FAMILY.items()
    },
    **OTHERS,
}
WRONG = {f"llama: tp2, {what}": {"tp": 2, "zero_stage": 1} for what in BROKEN}


def run_double(layouts: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, float]]:
    """Largest relative errors of loss and gradients, by name of the layout."""
    by_size: dict[int, dict[str, dict[str, Any]]] = {}
    for name, layout in layouts.items():
        size = double_worker.config_of(name, layout).parallel.world_size
        by_size.setdefault(size, {})[name] = layout
    jobs: list[Job] = []
    for size, listing in by_size.items():
        (folder / f"{size}.json").write_text(json.dumps(listing))
        arguments = [str(folder / f"{size}.json"), str(folder / f"errors{size}.json")]
        jobs.append((size, [double_worker.__file__, *arguments]))
    run_jobs(jobs)
    found: dict[str, dict[str, float]] = {}
    for size in by_size:
        found |= json.loads((folder / f"errors{size}.json").read_text())
    return found


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    return run_double({**LAYOUTS, **WRONG}, tmp_path_factory.mktemp("errors"))


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_and_every_gradient_equal_one_process(
    name: str, errors: dict[str, dict[str, float]]
) -> None:
    assert errors[name]["loss"] <= 1e-12
    assert errors[name]["gradient"] <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG)
def test_anything_done_wrong_would_be_seen(name: str, errors: dict[str, dict[str, float]]) -> None:
    assert errors[name]["gradient"] > 1e-3
