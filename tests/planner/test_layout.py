"""Layout arithmetic, and every rule of ``check_layout`` in both directions."""

from dataclasses import replace

import pytest

from fastllm_planner.arch import ArchSpec, MoeSpec
from fastllm_planner.backends import backend
from fastllm_planner.hardware import Cluster, gpu
from fastllm_planner.layout import Layout, check_layout

SPEC = ArchSpec("llama", 32, 4096, 32, 8, 128, 14336, 128256, 8192)
GOOD = Layout(dp=4, tp=4, pp=4, global_batch=64, seq_len=4096, sequence_parallel=True)
CLUSTER = Cluster(gpu("H100"), 64)


def reasons(layout: Layout, name: str = "megatron-fused", spec: ArchSpec = SPEC) -> list[str]:
    cluster = Cluster(gpu("H100"), layout.world_size)
    return check_layout(spec, layout, cluster, backend(name))


def test_a_good_layout_has_no_reasons() -> None:
    assert check_layout(SPEC, GOOD, CLUSTER, backend("megatron-fused")) == []
    assert GOOD.world_size == 64
    assert GOOD.micro_batches == 16
    assert GOOD.shard_size == 4


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tp": 3, "sequence_parallel": False}, "does not divide 32 attention heads"),
        ({"pp": 64}, "leaves stages without layers"),
        ({"virtual_stages": 3}, "virtual stages"),
        ({"virtual_stages": 2, "pp": 1}, "virtual stages need pp > 1"),
        ({"micro_batch": 3}, "is not a multiple of dp x micro-batch"),
        ({"tp": 1}, "sequence parallelism needs tp > 1"),
        ({"seq_len": 4098}, "cannot split 4098 tokens"),
        ({"ep": 2}, "needs a mixture of experts"),
        ({"zero_stage": 3}, "ZeRO-3"),
        ({"offload": "optimizer"}, "cannot offload"),
        ({"cp": 3}, "cp=3"),
        ({"virtual_stages": 2, "global_batch": 24}, "multiple of pp=4"),
    ],
)
def test_each_rule_rejects(change: dict[str, object], word: str) -> None:
    found = reasons(replace(GOOD, **change))  # type: ignore[arg-type]
    assert any(word in reason for reason in found), found


def test_tensor_parallelism_leaves_the_node_only_when_told() -> None:
    layout = Layout(dp=2, tp=16, global_batch=2, sequence_parallel=True)
    cluster = Cluster(gpu("H100"), 32)
    wide = backend("megatron-fused")
    assert any("leaves the node" in r for r in check_layout(SPEC, layout, cluster, wide))
    assert check_layout(SPEC, layout, cluster, wide, tp_across_nodes=True) == []


def test_world_size_must_match_the_cluster() -> None:
    found = check_layout(SPEC, GOOD, Cluster(gpu("H100"), 63), backend("megatron-fused"))
    assert any("64 devices, the cluster has 63" in reason for reason in found)


def test_device_without_the_dtype() -> None:
    layout = Layout(global_batch=1, dtype="bf16")
    found = check_layout(SPEC, layout, Cluster(gpu("V100"), 1, 4), backend("unfused"))
    assert found == ["V100-32G has no bf16 units"]


def test_deepspeed_refuses_zero_2_and_3_with_a_pipeline() -> None:
    layout = Layout(dp=2, pp=2, zero_stage=2, global_batch=4)
    found = reasons(layout, "fastllm")
    assert any("does not work with pipeline parallelism" in reason for reason in found)
    assert reasons(replace(layout, zero_stage=1), "fastllm") == []


def test_offload_needs_the_stage_that_shards_what_it_moves() -> None:
    base = Layout(dp=8, global_batch=8, offload="optimizer+params", zero_stage=2)
    assert any("parameter offload needs ZeRO-3" in r for r in reasons(base, "fastllm"))
    assert reasons(replace(base, zero_stage=3), "fastllm") == []


def test_expert_parallelism_divides_experts_and_ranks() -> None:
    moe = MoeSpec(experts=8, active_experts=2, ffn_hidden=1024)
    spec = replace(SPEC, moe=moe)
    assert reasons(Layout(dp=8, ep=8, global_batch=8), spec=spec) == []
    assert any("8 experts" in r for r in reasons(Layout(dp=12, ep=3, global_batch=12), spec=spec))
    assert any("dp x cp" in r for r in reasons(Layout(dp=6, ep=4, global_batch=6), spec=spec))


def test_tensor_parallelism_divides_the_experts() -> None:
    moe = MoeSpec(experts=8, active_experts=2, ffn_hidden=1026)
    layout = Layout(dp=2, tp=4, global_batch=4)
    found = reasons(layout, spec=replace(SPEC, moe=moe))
    assert found == ["tp=4 does not divide the experts' width 1026"]
    # without dense layers nothing has the dense width
    spec = replace(SPEC, ffn_hidden=1026, moe=replace(moe, ffn_hidden=1024))
    assert reasons(layout, spec=spec) == []
    dense_first = replace(spec, moe=replace(moe, ffn_hidden=1024, first_dense_layers=1))
    assert reasons(layout, spec=dense_first) == ["tp=4 does not divide the MLP width 1026"]
