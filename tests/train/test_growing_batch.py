"""Whole runs with a batch that grows, a schedule in samples, and evaluations: one order in every
layout, also across a restart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fault_worker
import pytest
import torch
from rank_job import run_ranks
from safetensors.torch import load_file
from train_layouts import tiny_config

from fastllm_train.config import Config, to_table
from fastllm_train.refusals import refuse

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"dp": 2, "zero_stage": 1},
    "dp2 zero3": {"dp": 2, "zero_stage": 3},
    "tp2": {"tp": 2, "zero_stage": 1},
    "pp2": {"pp": 2, "zero_stage": 2},
}
SAMPLES = 4 + 4 + 8 + 12 + 12 + 12


def config_of(folder: Path, parallel: dict[str, Any]) -> Config:
    config = tiny_config(
        parallel=parallel,
        batch={"global": 12, "rampup": [4, 4, 16]},
        optim={"name": "adamw", "lr": 3e-3, "clip": 1.0, "z_loss": 0.01},
        schedule={"kind": "wsd", "steps": 0, "samples": SAMPLES, "warmup_samples": 8},
        checkpoint={"every": 3, "keep_last": 0, "format": "portable"},
        eval={"every": 2, "samples": 5},
        logging={"ranks_every": 3},
        run={"out": str(folder)},
    )
    refuse(config, config.model.resolve())
    return config


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("growing")
    tables = {n: to_table(config_of(folder / n, parallel)) for n, parallel in LAYOUTS.items()}
    broken = to_table(config_of(folder / "broken off", LAYOUTS["dp2"]))
    tables["broken off"] = {**broken, "spikes": {"policy": "stop"}}
    tables["planted broken off"] = tables.pop("broken off")  # ends with an error at sample 40
    tables["gone on"] = broken
    (folder / "listing.json").write_text(json.dumps(tables))
    out = folder / "endings.json"
    run_ranks([fault_worker.__file__, str(folder / "listing.json"), str(out)], 2)
    endings = json.loads(out.read_text())[0]
    assert endings.pop("planted broken off").startswith("UserError: step 6: loss nan")
    assert set(endings.values()) == {"step 6"}
    return folder


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if record["kind"] == kind]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_takes_the_same_samples_and_rates(layout: str, ran: Path) -> None:
    steps, want = records(ran / layout, "step"), records(ran / "dp2", "step")
    assert [s["tokens"] // 32 for s in steps] == [4, 4, 8, 12, 12, 12]
    assert steps[-1]["consumed_samples"] == SAMPLES
    assert [s["lr"] for s in steps] == [s["lr"] for s in want]
    assert [s["loss"] for s in steps] == pytest.approx([s["loss"] for s in want], abs=1e-5)
    norms = [s["grad_norm"] for s in want]
    assert [s["grad_norm"] for s in steps] == pytest.approx(norms, rel=1e-5)
    found = [(e["step"], e["tokens"]) for e in records(ran / layout, "eval")]
    assert found == [(2, 160), (4, 160), (6, 160)]
    losses = [e["loss"] for e in records(ran / "dp2", "eval")]
    assert [e["loss"] for e in records(ran / layout, "eval")] == pytest.approx(losses, abs=1e-5)
    (times, _) = records(ran / layout, "ranks")
    assert (times["step"], times["steps"]) == (3, 3)
    assert all(len(seconds) == 2 for seconds in times["phase_s"].values())


@pytest.mark.slow
def test_a_restart_in_the_middle_changes_nothing(ran: Path) -> None:
    for file in (ran / "dp2/checkpoints/global_step6").glob("*.safetensors"):
        got = load_file(ran / "broken off/checkpoints/global_step6" / file.name)
        for name, tensor in load_file(file).items():
            assert torch.equal(got[name], tensor), name
