"""The five steps, as `make quickstart` runs them, with fewer training steps."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_five_steps_from_text_to_a_hugging_face_model(tmp_path: Path) -> None:
    out = tmp_path / "quickstart"
    bin_folder = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"}
    script = ROOT / "examples" / "quickstart" / "run.py"
    command = [sys.executable, str(script), "--out", str(out), "--steps", "6", "--extra-steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    # 1. plan: the classic tables, and a layout for two CPU processes.
    assert "129.45" in done.stdout
    assert "56.79" in done.stdout
    assert "dp = 2" in (out / "plan" / "train.toml").read_text(encoding="utf-8")

    # 2. data
    meta = json.loads((out / "data" / "corpus_text_document.meta.json").read_text(encoding="utf-8"))
    assert (out / "data" / "corpus_text_document.bin").stat().st_size > 1_000_000
    assert meta

    # 3. train: eight steps over two runs, the second resumed from the first's checkpoint.
    lines = (out / "train" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    runs = [record for record in records if record["kind"] == "run"]
    steps = [record for record in records if record["kind"] == "step"]
    assert [run["resumed_from"] for run in runs] == [None, 6]
    assert [step["step"] for step in steps] == [*range(1, 9)]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.5
    assert all(a["consumed_tokens"] < b["consumed_tokens"] for a, b in itertools.pairwise(steps))

    # 4. TFLOPs, with the convention and the peak named.
    assert "measured GEMM" in done.stdout

    # 5. convert: the folder loads in transformers and computes what the trained model computes.
    assert (out / "hf" / "model.safetensors").exists()
    assert "logits agree" in done.stdout
    assert "generated:" in done.stdout
