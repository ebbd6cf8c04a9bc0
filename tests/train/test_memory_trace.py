"""The memory trace: fake equals real tensors, and the engines; what ``check`` says of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trace_worker
from memory_layouts import BOUND, LAYOUTS, stages_of
from train_layouts import TINY, tiny_arch, tiny_config

from fastllm_train.__main__ import main
from fastllm_train.toml_text import to_toml
from fastllm_train.trace.step import trace_stage
from fastllm_train.trace.tracer import MemoryTracer

MIXTRAL = tiny_arch("mixtral")


def test_the_tracer_counts_what_lives() -> None:
    tracer = MemoryTracer("a")
    with tracer:
        first = torch.empty(1000)
        tracer.phase = "b"
        second = first[:10].clone()
        view = first.view(10, 100)
        del first
        assert tracer.live == {"a": 4096, "b": 512}
        del view
        assert tracer.current == 512
        tracer.track([second], "c")
        assert tracer.live["c"] == 512
    assert tracer.peak.total == 4608
    assert tracer.peak.by_category == {"a": 4096, "b": 512}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fake_tensors_take_the_bytes_of_real_ones(dtype: str, recompute: str) -> None:
    config = trace_worker.config_of(1, dtype, 2, recompute=recompute)
    spec = config.model.resolve()
    fake, real = (trace_stage(config, spec, 0, fake=fake).peak for fake in (True, False))
    assert fake.total == pytest.approx(real.total, rel=1e-4)
    assert fake.phase == real.phase


@pytest.mark.slow
def test_the_trace_equals_the_engines(tmp_path: Path) -> None:
    out = tmp_path / "peaks.json"
    done = subprocess.run(
        [sys.executable, trace_worker.__file__, str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    peaks = json.loads(out.read_text())
    cases = {name: trace_worker.config_of(*case) for name, case in trace_worker.CASES.items()}
    cases |= {
        name: trace_worker.torch_config_of(*case) for name, case in trace_worker.TORCH_CASES.items()
    }
    assert peaks.keys() == cases.keys()
    for name, real in peaks.items():
        config = cases[name]
        traced = trace_stage(config, config.model.resolve(), 0).peak.total
        assert traced == pytest.approx(real, rel=5e-3), name


def test_every_axis_is_traced() -> None:
    """Cutting a model makes a rank's part smaller; experts are routed evenly."""
    whole = {}
    for arch in (TINY, MIXTRAL):
        for parallel in (
            {"dp": 4},
            {"dp": 2, "tp": 2, "sequence_parallel": True},
            {"dp": 2, "pp": 2},
            {"dp": 2, "cp": 2},
            *([{"dp": 4, "ep": 2}] if arch is MIXTRAL else []),
        ):
            config = tiny_config(
                model={"arch": arch}, parallel={**parallel, "zero_stage": 1}, batch={"micro": 1}
            )
            found = trace_stage(config, config.model.resolve(), 0)
            name = arch["family"]
            if parallel == {"dp": 4}:
                whole[name] = found
            else:
                assert found.peak.total < whole[name].peak.total, (name, parallel)
            if "cp" not in parallel and parallel != {"dp": 4}:
                assert found.params < whole[name].params


def test_check_says_whether_it_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = {**TINY, "hidden": 16384, "heads": 128, "kv_heads": 128, "head_dim": 128}
    table = {
        "model": {"arch": {**wide, "ffn_hidden": 16384}},
        "parallel": {"pp": 2, "dp": 2, "zero_stage": 1},
        "batch": {"micro": 1, "global": 8, "seq_len": 64},
        "data": {"source": "synthetic"},
        "precision": {"dtype": "bf16"},
    }
    path = tmp_path / "config.toml"
    path.write_text(to_toml(table))
    assert main(["check", str(path), "--memory", "--gpu", "H100-SXM", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert [stage["layers"] for stage in memory["stages"]] == [1, 1]
    assert memory["stages"][0]["by_category"]["weights"] >= 2 * 7 * 16384**2
    assert memory["fits"]
    assert main(["check", str(path), "--memory", "--gpu", "V100-16G"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert main(["check", str(path), "--memory", "parallel.pp=1", "parallel.zero_stage=3"]) == 2
    assert "follows ZeRO 0 to 2" in capsys.readouterr().err
    assert main(["check", str(path), "--memory", "--gpu", "H10"]) == 2
    assert main(["check", str(path), "--gpu", "H100-SXM"]) == 2


@pytest.mark.parametrize("name", list(LAYOUTS)[:2])
def test_the_planner_foresees_the_trace(name: str) -> None:
    for row in stages_of(name):
        assert abs(row["off"]) <= BOUND, row
