"""Every parallel layout of every family in fp64: loss and gradients equal the whole model's."""

from __future__ import annotations

import json
from pathlib import Path

import layout_worker
import pytest
from layout_worker import BROKEN, LAYOUTS
from rank_job import run_jobs

Errors = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Errors:
    folder = tmp_path_factory.mktemp("errors")
    outs = {size: folder / f"{size}.json" for size in LAYOUTS}
    run_jobs([(size, [layout_worker.__file__, str(out)]) for size, out in outs.items()])
    found: Errors = {}
    for out in outs.values():
        found |= json.loads(Path(out).read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for layouts in LAYOUTS.values() for name in layouts])
def test_loss_and_every_gradient_equal_one_process(name: str, errors: Errors) -> None:
    """And what tensor-parallel ranks hold in copies has the same gradient to the bit."""
    error = errors[name]
    assert error["loss"] <= 1e-12
    assert error["gradient"] <= 1e-12
    assert error["copies differ"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("what", BROKEN)
def test_anything_done_wrong_would_be_seen(what: str, errors: Errors) -> None:
    assert errors[what]["gradient"] > 1e-3
