"""Spikes and failing saves: going back past the data, and writing in the background."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import fault_worker
import pytest
import torch
from rank_job import run_ranks
from safetensors.torch import load_file
from train_layouts import TINY, tiny_config

from fastllm_planner.arch import iter_params, spec_from_dict, to_hf_config
from fastllm_train.checkpoint import newest
from fastllm_train.config import to_table
from fastllm_train.errors import UserError
from fastllm_train.pretrained import PretrainedWeights
from fastllm_train.refusals import refuse
from fastllm_train.spikes import SpikesConfig, SpikeWatch

ADAMW = {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1}
REWIND = {"policy": "rewind"}


def table_of(folder: Path, parallel: dict[str, Any], **sections: Any) -> dict[str, Any]:
    config = tiny_config(
        parallel=parallel,
        optim=ADAMW,
        batch={"global": fault_worker.GLOBAL},
        schedule={"kind": "constant", "steps": 8},
        checkpoint={"every": fault_worker.SAVE_EVERY, "keep_last": 0, **sections.pop("saves", {})},
        run={"out": str(folder)},
        **sections,
    )
    refuse(config, config.model.resolve())
    return to_table(config)


BACKGROUND = {"format": "portable", "background": True}
DEEPSPEED = {"format": "deepspeed"}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "poisoned portable": ({"dp": 2, "zero_stage": 1}, {"saves": BACKGROUND, "spikes": REWIND}),
    "shifted portable": ({"dp": 2, "zero_stage": 1}, {"saves": {"format": "portable"}}),
    "poisoned zero3": ({"dp": 2, "zero_stage": 3}, {"saves": BACKGROUND, "spikes": REWIND}),
    "shifted zero3": ({"dp": 2, "zero_stage": 3}, {"saves": {"format": "portable"}}),
    "poisoned deepspeed": ({"pp": 2, "zero_stage": 1}, {"saves": DEEPSPEED, "spikes": REWIND}),
    "shifted deepspeed": ({"pp": 2, "zero_stage": 1}, {"saves": DEEPSPEED}),
    "poisoned stop": ({"dp": 2, "zero_stage": 1}, {"saves": BACKGROUND}),
    "from weights": ({"pp": 2, "zero_stage": 1}, {"saves": {"format": "portable"}}),
    "full disk": ({"dp": 2, "zero_stage": 1}, {"saves": BACKGROUND}),
}


def pretrained(folder: Path) -> Path:
    """A folder as transformers writes it, in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**to_hf_config(spec_from_dict(TINY)))
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    folder = tmp_path_factory.mktemp("faults")
    tables = {
        name: table_of(folder / name, parallel, **sections)
        for name, (parallel, sections) in RUNS.items()
    }
    tables["from weights"]["model"]["weights"] = str(pretrained(tmp_path_factory.mktemp("hf")))
    tables["from weights"]["optim"]["lr"] = 1e-30  # the weights stay what they were
    (folder / "listing.json").write_text(json.dumps(tables))
    out = folder / "endings.json"
    run_ranks([fault_worker.__file__, str(folder / "listing.json"), str(out)], 2)
    return folder, json.loads(out.read_text())


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = folder / f"checkpoints/global_step{step}"
    found: dict[str, torch.Tensor] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        found |= load_file(file)
    for file in sorted(checkpoint.glob("mp_rank_*_model_states.pt")):  # written by this test
        found |= torch.load(file, weights_only=False)["module"]
    assert found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("form", ["portable", "zero3", "deepspeed"])
def test_going_back_equals_never_having_read_those_samples(
    form: str, ran: tuple[Path, list[dict[str, str]]]
) -> None:
    folder, endings = ran
    for name in (f"poisoned {form}", f"shifted {form}"):
        assert [ending[name] for ending in endings] == ["step 8"] * 2
    got, want = (weights(folder / f"{kind} {form}", 8) for kind in ("poisoned", "shifted"))
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    lines = (folder / f"poisoned {form}/metrics.jsonl").read_text().splitlines()
    (rewind,) = [r for r in map(json.loads, lines) if r["kind"] == "rewind"]
    assert (rewind["step"], rewind["to_step"], rewind["skipped_samples"]) == (6, 4, 16)
    assert "nan" in rewind["reason"]


@pytest.mark.slow
def test_a_run_starts_from_a_hugging_face_folder(
    ran: tuple[Path, list[dict[str, str]]], tmp_path: Path
) -> None:
    folder, endings = ran
    assert [ending["from weights"] for ending in endings] == ["step 8"] * 2
    want = load_file(pretrained(tmp_path) / "model.safetensors")
    got = weights(folder / "from weights", 8)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor.float(), rtol=0, atol=1e-7)


def test_a_folder_of_another_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no readable"):
        PretrainedWeights(tmp_path, spec_from_dict(TINY))
    folder = pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks 9 of the model's tensors, model\.layers\.2"):
        PretrainedWeights(folder, spec_from_dict({**TINY, "layers": 3}))
    wide = spec_from_dict({**TINY, "vocab": 256})
    with pytest.raises(UserError, match=r"shape \[128, 64\], the model's has \[256, 64\]"):
        PretrainedWeights(folder, wide).weight(next(iter_params(wide)))


@pytest.mark.slow
def test_without_the_policy_the_run_stops_and_keeps_its_checkpoint(
    ran: tuple[Path, list[dict[str, str]]],
) -> None:
    folder, endings = ran
    first, second = (ending["poisoned stop"] for ending in endings)
    assert first.startswith("UserError: step 6: loss nan")
    assert second.startswith("PeerError")
    found = newest(folder / "poisoned stop/checkpoints")
    assert (found.step, found.rejected) == (4, ())


@pytest.mark.slow
def test_a_rank_that_cannot_write_ends_the_run_and_the_last_checkpoint_stays(
    ran: tuple[Path, list[dict[str, str]]],
) -> None:
    folder, endings = ran
    first, second = (ending["full disk"] for ending in endings)
    assert first.startswith("PeerError: another rank could not write the checkpoint of step 8")
    assert second.startswith("UserError: the checkpoint of step 8 could not be written")
    assert "No space left on device" in second
    found = newest(folder / "full disk/checkpoints")
    assert (found.step, found.rejected) == (4, ())


def test_what_counts_as_a_spike() -> None:
    watch = SpikeWatch(SpikesConfig(factor=1.5, window=8))
    assert watch.verdict(9.0, 1.0) is None  # nothing yet to compare with
    for _ in range(5):
        assert watch.verdict(4.0, 1.0) is None
    assert watch.verdict(5.9, 1.0) is None
    assert watch.verdict(6.1, 1.0) == "loss 6.1 is over 1.5 times the median 4"
    assert watch.verdict(4.0, math.inf) == "loss 4.0, gradient norm inf"
    watch.forget()
    assert watch.verdict(100.0, 1.0) is None
    assert SpikeWatch(SpikesConfig()).verdict(math.nan, 1.0) == "loss nan, gradient norm 1.0"


@pytest.mark.parametrize(
    ("values", "message"),
    [({"factor": 0.9}, "neither 0 nor above 1"), ({"window": 1}, "below 2")],
)
def test_settings_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SpikesConfig(**values)


def test_deepspeed_s_checkpoints_are_not_written_in_the_background() -> None:
    config = tiny_config(checkpoint={"background": True})
    with pytest.raises(UserError, match="writes portable checkpoints"):
        refuse(config, config.model.resolve())
