"""Which part of a tensor each tensor-parallel rank holds; layouts that are refused."""

from __future__ import annotations

import pytest
from train_layouts import TINY, tiny_config

from fastllm_planner.arch import iter_params, spec_from_dict
from fastllm_train.errors import UserError
from fastllm_train.refusals import refuse
from fastllm_train.tensor_parallel.sharding import shard_of, shard_shape


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
