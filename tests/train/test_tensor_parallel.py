"""Which part of a tensor each tensor-parallel rank holds; what its collectives wait for; layouts
that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_layouts import TINY, tiny_config

from fastllm_planner.arch import iter_params, spec_from_dict
from fastllm_train.errors import UserError
from fastllm_train.mesh import build_mesh
from fastllm_train.model_part import build_part, materialise
from fastllm_train.models.initialise import initialise
from fastllm_train.refusals import refuse
from fastllm_train.tensor_parallel.apply import cut_to_rank
from fastllm_train.tensor_parallel.sharding import shard_of, shard_shape
from fastllm_train.trace.step import fake_job


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


class Operations(TorchDispatchMode):
    """The order in which operators are called: their names; of a product its shape, too."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        name = str(func.name())
        self.called.append(f"mm {tuple(out.shape)}" if name == "aten::mm" else name)
        return out


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_input_s_gradient_travels_while_the_weights_get_theirs(sequence_parallel: bool) -> None:
    """Its sum is started before the products of every weight's gradient and awaited after them."""
    config = tiny_config(
        parallel={"tp": 2, "sequence_parallel": sequence_parallel}, speed={"kernels": "torch"}
    )
    spec = config.model.resolve()
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    with fake_job(0, 2):
        mesh = build_mesh(config.parallel)
        part = build_part(config, spec, mesh)
        materialise(part, torch.device("cpu"), torch.float32)
        initialise(part, spec, 1, cut=lambda p, whole: cut_to_rank(spec, mesh, p, whole))
        loss = part(tokens, torch.arange(32).expand(2, -1), tokens, torch.ones(2, 32))
        with Operations() as log:
            loss.objective.backward()
    operation = "reduce_scatter_tensor" if sequence_parallel else "all_reduce"
    started = [i for i, name in enumerate(log.called) if name.endswith(f"::{operation}")]
    beside: list[list[str]] = []
    for at in started:
        end = log.called.index("_c10d_functional::wait_tensor", at)
        beside.append(sorted(x for x in log.called[at:end] if x.startswith("mm")))
    hidden, kv, ffn = spec.hidden, spec.kv_size // 2, spec.ffn_hidden // 2
    attention = sorted([f"mm {(spec.q_size // 2, hidden)}", *[f"mm {(kv, hidden)}"] * 2])
    assert beside == [[f"mm {(ffn, hidden)}"] * 2, attention] * spec.layers


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
