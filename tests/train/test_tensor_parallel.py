"""Tensor and sequence parallel models equal the whole model: fp64 gradients, fp32 training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tensor_parallel_worker
import torch
from train_layouts import TINY, Trajectory, reference, tiny_config
from train_worker import run_layouts, run_ranks

from fastllm_planner.arch import iter_params, spec_from_dict
from fastllm_train.config import Config
from fastllm_train.errors import UserError
from fastllm_train.refusals import refuse
from fastllm_train.tensor_parallel.sharding import shard_of, shard_shape


@pytest.mark.slow
@pytest.mark.parametrize("tp", [2, 4])
def test_loss_and_every_gradient_in_fp64(tp: int, tmp_path: Path) -> None:
    """Includes 2 and 1 key/value heads on 4 ranks, recomputation, tied embeddings, ALiBi; and
    leaving out any piece of communication shows."""
    out = tmp_path / "errors.json"
    run_ranks([tensor_parallel_worker.__file__, str(out)], tp)
    errors = json.loads(out.read_text())
    broken = {name: errors.pop(name) for name in list(errors) if name.startswith("without ")}
    assert len(broken) == len(tensor_parallel_worker.BROKEN)
    for name, error in broken.items():
        assert error["gradient"] > 1e-3, name
    assert len(errors) == 2 * len(tensor_parallel_worker.VARIANTS) + 2
    for name, error in errors.items():
        assert error["loss"] <= 1e-12, name
        assert error["gradient"] <= 1e-12, name
        assert error["replicas differ"] == 0, name


ADAMW = {"name": "adamw", "lr": 3e-3, "clip": 0.1, "weight_decay": 0.1, "eps": 1e-5}


def two_ranks() -> dict[str, Config]:
    """SGD with clipping that acts: it shows a gradient norm that counts a tensor twice."""
    configs: dict[str, Config] = {}
    for stage in (0, 1, 3):
        parallel = {"tp": 2, "zero_stage": stage}
        configs[f"sgd_tp2_zero{stage}"] = tiny_config(parallel=parallel)
    parallel = {"tp": 2, "zero_stage": 1, "sequence_parallel": True, "recompute": "full"}
    configs["sgd_tp2_sp_recompute"] = tiny_config(parallel=parallel)
    configs["adamw_tp2_sp"] = tiny_config(
        parallel={"tp": 2, "zero_stage": 1, "sequence_parallel": True}, optim=ADAMW
    )
    configs["unmarked_tp2"] = tiny_config(parallel={"tp": 2, "zero_stage": 1})
    return configs


def four_ranks() -> dict[str, Config]:
    """TP 4 with 2 key/value heads; TP 2 × DP 2."""
    configs = {
        "sgd_tp4_sp": tiny_config(parallel={"tp": 4, "zero_stage": 1, "sequence_parallel": True}),
        "sgd_tp4_zero0": tiny_config(parallel={"tp": 4, "zero_stage": 0}),
    }
    for stage in (0, 1, 2, 3):
        parallel = {"tp": 2, "dp": 2, "zero_stage": stage, "sequence_parallel": stage == 1}
        configs[f"sgd_tp2_dp2_zero{stage}"] = tiny_config(parallel=parallel)
    return configs


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trajectory]:
    two = run_layouts(two_ranks(), tmp_path_factory.mktemp("two"))
    return {**two, **run_layouts(four_ranks(), tmp_path_factory.mktemp("four"))}


@pytest.fixture(scope="module")
def references() -> dict[str, Trajectory]:
    return {"sgd": reference(tiny_config()), "adamw": reference(tiny_config(optim=ADAMW))}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [n for n in {**two_ranks(), **four_ranks()} if not n.startswith("unmarked")]
)
def test_training_equals_one_process(
    name: str, trajectories: dict[str, Trajectory], references: dict[str, Trajectory]
) -> None:
    got, want = trajectories[name], references[name.split("_")[0]]
    assert got.losses == pytest.approx(want.losses, abs=1e-5)
    assert got.norms == pytest.approx(want.norms, rel=1e-5)
    assert list(got.weights) == list(want.weights)
    for key, weight in want.weights.items():
        torch.testing.assert_close(got.weights[key], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_norm_that_misses_sharded_tensors_would_be_seen(
    trajectories: dict[str, Trajectory], references: dict[str, Trajectory]
) -> None:
    wrong, right = trajectories["unmarked_tp2"], references["sgd"]
    assert wrong.norms[0] < 0.95 * right.norms[0]
    assert abs(wrong.losses[1] - right.losses[1]) > 1e-4


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_shards_tile_every_tensor(tp: int) -> None:
    spec = spec_from_dict(TINY)
    for param in iter_params(spec):
        shards = [shard_of(spec, param, tp, rank) for rank in range(tp)]
        if param.tp_axis is None:
            assert shards == [None] * tp
            continue
        covered: list[int] = []
        for rank, shard in enumerate(shards):
            assert shard is not None
            assert shard_shape(spec, param, tp, rank)[shard.axis] == shard.length
            if rank % shard.copies == 0:
                covered += range(shard.start, shard.start + shard.length)
        assert covered == list(range(param.shape[param.tp_axis]))


def test_key_heads_are_shared_by_the_ranks_of_their_queries() -> None:
    spec = spec_from_dict(TINY)  # 4 query heads, 2 key heads of width 16
    key = next(p for p in iter_params(spec) if p.name.endswith("0.self_attn.k_proj.weight"))
    shards = [shard_of(spec, key, 4, rank) for rank in range(4)]
    assert [s.start for s in shards if s is not None] == [0, 0, 16, 16]
    assert {s.copies for s in shards if s is not None} == {2}


@pytest.mark.parametrize(
    ("parallel", "arch", "message"),
    [
        ({"tp": 3}, {}, "tp=3 does not divide 4 heads"),
        ({"tp": 4}, {"ffn_hidden": 98}, "tp=4 does not divide 98 MLP columns"),
        ({"tp": 4}, {"vocab": 129}, "tp=4 does not divide 129 vocabulary entries"),
        ({"tp": 6}, {"heads": 12, "kv_heads": 4, "vocab": 132}, "neither divides the other"),
        (
            {"tp": 4},
            {"moe": {"experts": 2, "active_experts": 1, "ffn_hidden": 6}},
            "4 does not divide 6 columns of an expert",
        ),
    ],
)
def test_refused_layouts(
    parallel: dict[str, object], arch: dict[str, object], message: str
) -> None:
    family = "mixtral" if "moe" in arch else "llama"
    config = tiny_config(parallel=parallel, model={"arch": {**TINY, "family": family, **arch}})
    with pytest.raises(UserError, match=message):
        refuse(config, config.model.resolve())
