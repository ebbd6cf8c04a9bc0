"""Spikes and failing saves: going back past the data, and writing in the background."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import fault_worker
import pytest
import torch
from rank_job import run_jobs
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
SKIP = {"policy": "skip"}
FP16 = {"dtype": "fp16", "loss_scale": 2**19, "loss_scale_hysteresis": 1, "loss_scale_window": 1}


def table_of(folder: Path, parallel: dict[str, Any], **sections: Any) -> dict[str, Any]:
    config = tiny_config(
        parallel=parallel,
        optim=ADAMW,
        batch={"global": fault_worker.GLOBAL},
        schedule=sections.pop("schedule", {"kind": "constant", "steps": 8}),
        checkpoint={
            "every": fault_worker.SAVE_EVERY,
            "keep_last": 0,
            **sections.pop("saves", {"format": "portable"}),
        },
        run={"out": str(folder)},
        **sections,
    )
    refuse(config, config.model.resolve())
    return to_table(config)


BACKGROUND = {"format": "portable", "background": True}
DEEPSPEED = {"format": "deepspeed"}
TORCH = {"engine": "torch"}
ENGINES = {"torch bf16": {"speed": TORCH}}
RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "poisoned portable": ({"dp": 2, "zero_stage": 1}, {"saves": BACKGROUND, "spikes": REWIND}),
    "shifted portable": ({"dp": 2, "zero_stage": 1}, {"saves": {"format": "portable"}}),
    "poisoned zero3": ({"dp": 2, "zero_stage": 3}, {"saves": BACKGROUND, "spikes": REWIND}),
    "shifted zero3": ({"dp": 2, "zero_stage": 3}, {"saves": {"format": "portable"}}),
    "poisoned deepspeed": ({"pp": 2, "zero_stage": 1}, {"saves": DEEPSPEED, "spikes": REWIND}),
    "shifted deepspeed": ({"pp": 2, "zero_stage": 1}, {"saves": DEEPSPEED}),
    "poisoned torch": (
        {"dp": 2, "zero_stage": 0},
        {"saves": BACKGROUND, "spikes": REWIND, "speed": TORCH},
    ),
    "shifted torch": ({"dp": 2, "zero_stage": 0}, {"saves": BACKGROUND, "speed": TORCH}),
    "poisoned stop": ({"dp": 2, "zero_stage": 1}, {"saves": BACKGROUND}),
    "from weights": ({"pp": 2, "zero_stage": 1}, {"saves": {"format": "portable"}}),
    "full disk": ({"dp": 2, "zero_stage": 1}, {"saves": BACKGROUND}),
    "full disk, in turn": ({"dp": 2, "zero_stage": 1}, {"saves": {"format": "portable"}}),
    **{
        f"{kind} {name}": (
            {**layout, "zero_stage": stage},
            {"precision": {"dtype": dtype}, **ENGINES.get(name, {}), **more},
        )
        for name, layout, stage, dtype in (
            ("zero0 fp32", {"dp": 2}, 0, "fp32"),
            ("zero1 bf16", {"dp": 2}, 1, "bf16"),
            ("zero3 bf16", {"dp": 2}, 3, "bf16"),
            ("pp2 fp32", {"pp": 2}, 1, "fp32"),
            ("torch bf16", {"dp": 2}, 0, "bf16"),
        )
        for kind, more in (
            ("planted", {"spikes": SKIP}),
            ("infinite", {"spikes": SKIP}),
            ("omitted", {"schedule": {"kind": "constant", "steps": 7}}),
        )
    },
    "fp16 dp2": ({"dp": 2}, {"precision": FP16}),
    "fp16 tp2": ({"tp": 2, "zero_stage": 2}, {"precision": FP16}),
    "fp16 pp2": ({"pp": 2}, {"precision": FP16}),
    "fp16 zero3": ({"dp": 2, "zero_stage": 3}, {"precision": FP16}),
    "fp16 small scale": ({"dp": 2}, {"precision": {"dtype": "fp16", "loss_scale": 1024}}),
    "fp32": ({"dp": 2}, {}),
    "fp16 to be resumed": ({"dp": 2}, {"precision": FP16}),
    "planted too often": ({"dp": 2}, {"spikes": {"policy": "skip", "max_skips": 0}}),
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
    tables["fp16 to be resumed"]["schedule"]["steps"] = 4
    tables["fp16 resumed"] = json.loads(json.dumps(tables["fp16 to be resumed"]))
    tables["fp16 resumed"]["schedule"]["steps"] = 8
    tables["from weights"]["model"]["weights"] = str(pretrained(tmp_path_factory.mktemp("hf")))
    tables["from weights"]["optim"]["lr"] = 1e-30  # the weights stay what they were
    (folder / "listing.json").write_text(json.dumps(tables))
    zero1 = {"dp": 2, "zero_stage": 1}
    last = {"full disk, deepspeed": table_of(folder / "ds", zero1, saves=DEEPSPEED)}
    (folder / "last.json").write_text(json.dumps(last))
    out = folder / "endings.json"
    arguments = [[str(folder / f"{name}.json"), str(out)] for name in ("listing", "last")]
    with pytest.raises(AssertionError) as failed:  # the last job's
        run_jobs([(2, [fault_worker.__file__, *each]) for each in arguments])
    (folder / "failed").write_text(str(failed.value))
    assert out.exists(), failed.value
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
@pytest.mark.parametrize("form", ["portable", "zero3", "deepspeed", "torch"])
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
@pytest.mark.parametrize(
    "layout", ["zero0 fp32", "zero1 bf16", "zero3 bf16", "pp2 fp32", "torch bf16"]
)
@pytest.mark.parametrize("kind", ["planted", "infinite"])
def test_one_rank_s_bad_number_leaves_out_the_update_on_all(
    kind: str, layout: str, ran: tuple[Path, list[dict[str, str]]]
) -> None:
    """As if the step's samples had never been there: weights and moments are equal to the bit."""
    folder, endings = ran
    assert [ending[f"{kind} {layout}"] for ending in endings] == ["step 8"] * 2
    got, want = weights(folder / f"{kind} {layout}", 8), weights(folder / f"omitted {layout}", 7)
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    lines = (folder / f"{kind} {layout}/metrics.jsonl").read_text().splitlines()
    records = list(map(json.loads, lines))
    (skip,) = [r for r in records if r["kind"] == "skip"]
    assert skip["step"] == 6
    assert ("loss nan" if kind == "planted" else "gradient norm") in skip["reason"]
    assert [r["step"] for r in records if r["kind"] == "step" and not r["updated"]] == [6]
    state = json.loads(
        (folder / f"{kind} {layout}/checkpoints/global_step8/state.json").read_text()
    )
    assert (state["step"], state["optimizer_steps"]) == (8, 7)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == "step"]


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2", "zero3"])
def test_fp16_leaves_out_overflowing_steps_on_all_ranks(
    layout: str, ran: tuple[Path, list[dict[str, str]]]
) -> None:
    folder, endings = ran
    assert [ending[f"fp16 {layout}"] for ending in endings] == ["step 8"] * 2
    steps = steps_of(folder / f"fp16 {layout}")
    assert 3 <= sum(step["updated"] for step in steps) < 8
    for step, after in itertools.pairwise(steps):
        if not step["updated"]:
            assert math.isinf(step["grad_norm"])
            assert after["loss_scale"] == step["loss_scale"] / 2
    assert any(b["loss_scale"] == 2 * a["loss_scale"] for a, b in itertools.pairwise(steps))
    assert steps[-1]["loss"] < steps[0]["loss"]


@pytest.mark.slow
def test_fp16_trains_as_fp32_does(ran: tuple[Path, list[dict[str, str]]]) -> None:
    got, want = (steps_of(ran[0] / name) for name in ("fp16 small scale", "fp32"))
    assert all(step["updated"] for step in got)
    losses = [[step["loss"] for step in run] for run in (got, want)]
    assert losses[0] == pytest.approx(losses[1], abs=5e-3)
    norms = [[step["grad_norm"] for step in run] for run in (got, want)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)


@pytest.mark.slow
def test_the_loss_scale_goes_on_where_it_was(ran: tuple[Path, list[dict[str, str]]]) -> None:
    folder, endings = ran
    assert endings[0]["fp16 resumed"] == "step 8"
    got, want = (weights(folder / name, 8) for name in ("fp16 to be resumed", "fp16 dp2"))
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor), name
    scales = [s["loss_scale"] for s in steps_of(folder / "fp16 to be resumed")]
    assert scales == [s["loss_scale"] for s in steps_of(folder / "fp16 dp2")]


@pytest.mark.slow
def test_too_many_updates_left_out_in_a_row_end_the_run(
    ran: tuple[Path, list[dict[str, str]]],
) -> None:
    first, second = (ending["planted too often"] for ending in ran[1])
    assert first.startswith("UserError: step 6: loss nan")
    assert second.startswith("PeerError")


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
@pytest.mark.parametrize("name", ["full disk", "full disk, in turn"])
def test_a_rank_that_cannot_write_ends_the_run_and_the_last_checkpoint_stays(
    name: str,
    ran: tuple[Path, list[dict[str, str]]],
) -> None:
    folder, endings = ran
    first, second = (ending[name] for ending in endings)
    assert first.startswith("PeerError: another rank could not write the checkpoint of step 8")
    assert second.startswith("UserError: the checkpoint of step 8 could not be written")
    assert "File too large" in second
    found = newest(folder / name / "checkpoints")
    assert (found.step, found.rejected) == (4, ())


@pytest.mark.slow
def test_a_disk_that_is_full_for_deepspeed_s_files_ends_the_rank_and_the_last_checkpoint_stays(
    ran: tuple[Path, list[dict[str, str]]],
) -> None:
    """The launcher ends the other, which waits inside DeepSpeed."""
    folder, _ = ran
    log = (folder / "failed").read_text()
    assert "fault_worker.py, rank 1 of 2:" in log
    assert "UserError: the checkpoint of step 8 could not be written: [Errno 27]" in log
    assert not list((folder / "ds/checkpoints/.saving").glob(".probe*"))
    found = newest(folder / "ds/checkpoints")
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
