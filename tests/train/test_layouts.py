"""Pipeline, context and expert parallelism equal one process: fp64 gradients, fp32 training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import layout_worker
import pytest
import torch
from test_data_parallel import ADAMW, BF16, GPT2, MIXTRAL
from train_layouts import TINY, Trajectory, reference, tiny_config
from train_worker import run_layouts, run_ranks

from fastllm_planner.arch import iter_params, preset
from fastllm_train.checkpoint import written_format
from fastllm_train.config import Config
from fastllm_train.errors import UserError
from fastllm_train.layout import ParallelConfig
from fastllm_train.mesh import groups_of
from fastllm_train.model_part import owners
from fastllm_train.pipeline.schedule import one_forward_one_backward
from fastllm_train.pipeline.split import layer_costs, split_by_cost, split_layers, stage_of
from fastllm_train.refusals import refuse


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [4, 8])
def test_loss_and_every_gradient_in_fp64(world_size: int, tmp_path: Path) -> None:
    """And doing any one piece of it wrong shows."""
    out = tmp_path / "errors.json"
    run_ranks([layout_worker.__file__, str(out)], world_size)
    errors = json.loads(out.read_text())
    for name in layout_worker.BROKEN if world_size == 4 else ():
        assert errors.pop(name)["gradient"] > 1e-3, name
    assert errors.keys() == layout_worker.LAYOUTS[world_size].keys()
    for name, error in errors.items():
        assert error["loss"] <= 1e-12, name
        assert error["gradient"] <= 1e-12, name


def config_of(arch: str, parallel: dict[str, Any], **sections: Any) -> Config:
    archs = {"llama": TINY, "gpt2": GPT2, "mixtral": MIXTRAL}
    batch = {"micro": 1 if parallel.get("dp", 1) < 4 else 2}
    return tiny_config(model={"arch": archs[arch]}, parallel=parallel, batch=batch, **sections)


def configs_of(world_size: int) -> dict[str, Config]:
    """Names start with what they are compared with. SGD with clipping that acts shows a gradient
    norm that counts a tensor twice or not at all."""
    if world_size == 2:
        found = {
            f"llama pp2 zero{stage}": config_of("llama", {"pp": 2, "zero_stage": stage})
            for stage in (0, 1, 2)
        }
        for stage in (1, 3):
            parallel = {"cp": 2, "zero_stage": stage}
            found[f"llama cp2 zero{stage}"] = config_of("llama", parallel)
        for stage in (1, 2):
            parallel = {"dp": 2, "ep": 2, "zero_stage": stage}
            found[f"mixtral ep2 zero{stage}"] = config_of("mixtral", parallel)
        found["gpt2 pp2"] = config_of("gpt2", {"pp": 2, "zero_stage": 1})
        offload = {"pp": 2, "zero_stage": 1, "offload": "optimizer", "recompute": "full"}
        found["adamw pp2 offload, recompute"] = config_of("llama", offload, optim=ADAMW)
        found["bf16 pp2"] = config_of("llama", {"pp": 2}, optim=ADAMW, precision=BF16)
        found["unmarked pp2"] = config_of("llama", {"pp": 2, "zero_stage": 1})
        return found
    if world_size == 4:
        return {
            "llama tp2 pp2": config_of("llama", {"tp": 2, "pp": 2, "zero_stage": 1}),
            "gpt2 pp2 dp2 zero2": config_of("gpt2", {"pp": 2, "dp": 2, "zero_stage": 2}),
            "mixtral ep2 dp4": config_of("mixtral", {"dp": 4, "ep": 2, "zero_stage": 1}),
            "mixtral ep2 pp2": config_of("mixtral", {"dp": 2, "ep": 2, "pp": 2}),
        }
    sp = {"sequence_parallel": True}
    return {
        "llama tp2 pp2 dp2 sp": config_of("llama", {"tp": 2, "pp": 2, "dp": 2, **sp}),
        "adamw tp2 pp2 dp2": config_of("llama", {"tp": 2, "pp": 2, "dp": 2}, optim=ADAMW),
        "gpt2 tp2 pp2 dp2 zero0": config_of("gpt2", {"tp": 2, "pp": 2, "dp": 2, "zero_stage": 0}),
    }


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trajectory]:
    found: dict[str, Trajectory] = {}
    for world_size in (2, 4, 8):
        folder = tmp_path_factory.mktemp(f"size{world_size}")
        found |= run_layouts(configs_of(world_size), folder)
    return found


@pytest.fixture(scope="module")
def references() -> dict[str, Trajectory]:
    return {
        "llama": reference(tiny_config()),
        "adamw": reference(tiny_config(optim=ADAMW)),
        "gpt2": reference(config_of("gpt2", {})),
        "mixtral": reference(config_of("mixtral", {})),
        "bf16": reference(tiny_config(optim=ADAMW), dtype=torch.bfloat16),
    }


NAMES = [name for size in (2, 4, 8) for name in configs_of(size)]


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n.split()[0] not in ("bf16", "unmarked")])
def test_training_equals_one_process(
    name: str, trajectories: dict[str, Trajectory], references: dict[str, Trajectory]
) -> None:
    got, want = trajectories[name], references[name.split()[0]]
    assert got.losses == pytest.approx(want.losses, abs=1e-5)
    assert got.norms == pytest.approx(want.norms, rel=1e-5)
    assert list(got.weights) == list(want.weights)
    for key, weight in want.weights.items():
        torch.testing.assert_close(got.weights[key], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_bf16_pipeline_follows_a_reference_with_fp32_master(
    trajectories: dict[str, Trajectory], references: dict[str, Trajectory]
) -> None:
    got, want = trajectories["bf16 pp2"], references["bf16"]
    assert got.losses == pytest.approx(want.losses, abs=5e-3)
    assert got.norms == pytest.approx(want.norms, rel=2e-2)


@pytest.mark.slow
def test_a_norm_that_misses_later_stages_would_be_seen(
    trajectories: dict[str, Trajectory], references: dict[str, Trajectory]
) -> None:
    assert trajectories["unmarked pp2"].norms[0] < 0.95 * references["llama"].norms[0]


def test_the_schedule_holds_few_micro_batches_and_runs_each_once() -> None:
    for stages in (1, 2, 4):
        for stage in range(stages):
            for count in (1, 2, 3, 8):
                actions = list(one_forward_one_backward(stage, stages, count))
                under_way = most = 0
                for kind, _ in actions:
                    under_way += 1 if kind == "forward" else -1
                    most = max(most, under_way)
                assert most == min(stages - stage, count)
                for kind in ("forward", "backward"):
                    assert [i for k, i in actions if k == kind] == list(range(count))


def test_layers_are_split_by_cost() -> None:
    assert split_by_cost([1.0] * 4, 0.0, 2) == (range(2), range(2, 4))
    assert split_by_cost([1.0] * 4, 2.0, 2) == (range(3), range(3, 4))
    assert split_by_cost([1.0] * 5, 0.0, 2) in ((range(3), range(3, 5)), (range(2), range(2, 5)))
    assert split_by_cost([4.0, 1.0, 1.0, 1.0, 1.0], 0.0, 2) == (range(1), range(1, 5))
    spec = preset("llama-3-8b")  # the head costs as much as two layers
    sizes = [len(layers) for layers in split_layers(spec, 8192, 4)]
    assert sum(sizes) == 32
    assert sizes[-1] < 8
    slowest = max(sizes[:-1]) * layer_costs(spec, 8192)[0]
    even = 8 * layer_costs(spec, 8192)[0] + 2.0 * spec.vocab * spec.hidden
    assert slowest < even


def test_every_parameter_has_one_stage_and_one_owner() -> None:
    config = config_of("mixtral", {"dp": 4, "ep": 2, "pp": 2})
    spec = config.model.resolve()
    split = split_layers(spec, 32, 2)
    assert {stage_of(p, split) for p in iter_params(spec)} == {0, 1}
    found = owners(config, spec)
    assert set(found) == {p.name for p in iter_params(spec)}
    for expert in range(6):
        name = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
        at = config.parallel.coordinates(found[name])
        assert (at.pp, at.ep) == (1, expert // 3)


def test_ranks_and_coordinates_are_one_to_one() -> None:
    parallel = ParallelConfig(dp=4, ep=2, tp=2, pp=2, cp=2)
    ranks = range(parallel.world_size)
    assert [parallel.rank_of(parallel.coordinates(rank)) for rank in ranks] == list(ranks)
    for varying in (("tp",), ("edp", "ep", "cp"), ("pp", "tp"), ("ep",)):
        groups = groups_of(parallel, varying)
        assert sorted(rank for group in groups for rank in group) == list(ranks)
    assert groups_of(parallel, ("tp",))[0] == [0, 1]
    assert groups_of(parallel, ("ep",))[0] == [0, 4]


@pytest.mark.parametrize(
    ("parallel", "arch", "message"),
    [
        ({"pp": 3}, {}, "pp=3 leaves stages without layers: the model has 2"),
        ({"pp": 2, "zero_stage": 3}, {}, "gathers a layer's weights for every micro-batch"),
        ({"cp": 3}, {}, "32 tokens does not divide into 3 parts"),
        ({"cp": 8}, {}, "cp=8 does not divide 4 heads"),
        ({"cp": 4, "tp": 2}, {}, "cp=4 does not divide 2 heads"),
        ({"dp": 2, "ep": 2}, {}, "the model has no experts"),
        ({"dp": 4, "ep": 4}, MIXTRAL, "ep=4 does not divide 6 experts"),
        ({"dp": 2, "ep": 2, "zero_stage": 3}, MIXTRAL, "gives each its own experts"),
    ],
)
def test_refused_layouts(
    parallel: dict[str, object], arch: dict[str, object], message: str
) -> None:
    config = tiny_config(parallel=parallel, model={"arch": {**TINY, **arch}})
    with pytest.raises(UserError, match=message):
        refuse(config, config.model.resolve())


def test_experts_are_not_written_in_deepspeed_s_format() -> None:
    table = {"parallel": {"dp": 2, "ep": 2, "zero_stage": 1}, "model": {"arch": MIXTRAL}}
    config = tiny_config(**table)
    refuse(config, config.model.resolve())
    assert written_format(config.checkpoint, config.parallel) == "portable"
    assert written_format(config.checkpoint, ParallelConfig(pp=2)) == "portable"
    assert written_format(config.checkpoint, ParallelConfig(tp=2)) == "deepspeed"
    config = tiny_config(**table, checkpoint={"format": "deepspeed"})
    with pytest.raises(UserError, match="DeepSpeed's checkpoints do not hold"):
        refuse(config, config.model.resolve())


def test_experts_are_shared_out_among_replicas() -> None:
    with pytest.raises(UserError, match=r"ep=2 does not divide parallel\.dp=3"):
        tiny_config(parallel={"dp": 3, "ep": 2})
