"""Layouts on paper: schedule, split, owners and ranks; and what is refused."""

from __future__ import annotations

import pytest
from train_layouts import TINY, tiny_arch, tiny_config

from fastllm_planner.arch import iter_params, preset
from fastllm_train.checkpoint import written_format
from fastllm_train.errors import UserError
from fastllm_train.layout import ParallelConfig
from fastllm_train.mesh import groups_of
from fastllm_train.model_part import owners
from fastllm_train.pipeline.schedule import one_forward_one_backward
from fastllm_train.pipeline.split import layer_costs, split_by_cost, split_layers, stage_of
from fastllm_train.refusals import refuse

MIXTRAL = tiny_arch("mixtral")


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
    config = tiny_config(
        model={"arch": MIXTRAL}, parallel={"dp": 4, "ep": 2, "pp": 2}, batch={"micro": 1}
    )
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
    assert written_format(config) == "portable"
    assert written_format(tiny_config(parallel={"pp": 2})) == "portable"
    assert written_format(tiny_config(parallel={"tp": 2})) == "deepspeed"
    config = tiny_config(**table, checkpoint={"format": "deepspeed"})
    with pytest.raises(UserError, match="DeepSpeed's checkpoints do not hold"):
        refuse(config, config.model.resolve())


def test_experts_are_shared_out_among_replicas() -> None:
    with pytest.raises(UserError, match=r"ep=2 does not divide parallel\.dp=3"):
        tiny_config(parallel={"dp": 3, "ep": 2})
