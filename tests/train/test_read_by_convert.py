"""DeepSpeed's own checkpoints of any layout: fastllm-convert reads what the trainer wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from train_layouts import ADAMW, TINY, Trajectory, tiny_config
from train_worker import SAVE_AT, run_layouts

from fastllm_convert.__main__ import main as convert
from fastllm_planner.arch import to_hf_config
from fastllm_train.config import Config

SP = {"sequence_parallel": True}
LAYOUTS: dict[str, dict[str, Any]] = {
    "save pp2": {"pp": 2, "zero_stage": 1},
    "save tied pp2": {"pp": 2, "zero_stage": 2},
    "save tp2 pp2": {"tp": 2, "pp": 2, "zero_stage": 1, **SP},
    "save tied tp2 pp2": {"tp": 2, "pp": 2, "zero_stage": 1},
}


def config_of(name: str, folder: Path) -> Config:
    tied = "tied" in name
    return tiny_config(
        # Sizes that ranks do not divide: ZeRO's partitions cut through tensors.
        model={"arch": {**TINY, "vocab": 130, "ffn_hidden": 98, "tied_embeddings": tied}},
        parallel=LAYOUTS[name],
        optim=ADAMW,
        precision={"dtype": "bf16"},
        checkpoint={"format": "deepspeed"},
        schedule={"kind": "constant", "steps": SAVE_AT},
        run={"out": str(folder / name)},
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Trajectory]]:
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_layouts({name: config_of(name, folder) for name in LAYOUTS}, folder)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["master", "model"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_hugging_face_gets_the_trained_weights(
    name: str, weights: str, saved: tuple[Path, dict[str, Trajectory]], tmp_path: Path
) -> None:
    """The fp32 masters to the bit, or what the model computed with: the masters in bf16."""
    from transformers import AutoModelForCausalLM

    folder, trajectories = saved
    source = folder / name / f"global_step{SAVE_AT}"
    spec = config_of(name, folder).model.resolve()
    (source / "config.json").write_text(json.dumps(to_hf_config(spec)))
    target = tmp_path / "hf"
    assert convert(["run", str(source), str(target), "--to", "hf", "--weights", weights]) == 0
    got = load_file(target / "model.safetensors")
    want = trajectories[name].weights
    assert got.keys() == want.keys()
    for key, weight in want.items():
        assert torch.equal(got[key], weight if weights == "master" else weight.bfloat16()), key
    loaded = AutoModelForCausalLM.from_pretrained(target, dtype="auto").state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in got.items())
