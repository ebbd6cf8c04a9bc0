"""Step time: the account adds up, factors act where they should, search's assumptions hold."""

from dataclasses import fields, replace

import pytest

from fastllm_planner.arch import ArchSpec, preset
from fastllm_planner.backends import backend, backend_names
from fastllm_planner.communication import all_reduce_seconds, gather_seconds, group
from fastllm_planner.hardware import Cluster, gpu
from fastllm_planner.kernels import gemm_efficiency, layer_time_of
from fastllm_planner.layout import Layout
from fastllm_planner.profile import Profile
from fastllm_planner.steptime import StepEstimate, estimate_step, step_seconds

SPEC = preset("llama-2-70b")
LAYOUT = Layout(dp=4, tp=8, pp=4, global_batch=256, seq_len=4096, sequence_parallel=True)
CAUSES = (
    "compute", "recompute", "tp_comm", "cp_comm", "ep_comm", "pp_comm", "dp_comm", "bubble",
    "optimizer", "offload", "overhead",
)  # fmt: skip


def step(layout: Layout = LAYOUT, name: str = "megatron-fused", **extra: object) -> StepEstimate:
    cluster = Cluster(gpu("H100"), layout.world_size)
    return estimate_step(SPEC, layout, cluster, backend(name), **extra)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", backend_names())
@pytest.mark.parametrize(
    "layout",
    [
        LAYOUT,
        replace(LAYOUT, recompute="full", micro_batch=2),
        replace(LAYOUT, pp=8, dp=2, recompute="selective"),
        Layout(dp=128, zero_stage=3, global_batch=256, seq_len=4096),
        Layout(dp=16, cp=8, global_batch=256, seq_len=32768),
    ],
)
def test_causes_add_up_to_the_total(name: str, layout: Layout) -> None:
    estimate = step(layout, name)
    assert sum(getattr(estimate, cause) for cause in CAUSES) == pytest.approx(estimate.total)
    assert all(getattr(estimate, cause) >= 0 for cause in CAUSES)
    assert {f.name for f in fields(estimate)} > set(CAUSES)
    assert estimate.low < estimate.total < estimate.high


def test_flops_conventions_agree_with_the_time() -> None:
    estimate = step()
    tokens = 256 * 4096
    assert estimate.tokens_per_s_per_gpu == pytest.approx(tokens / estimate.total / 128)
    assert estimate.mfu("causal") < estimate.mfu("full") < 1
    assert estimate.mfu() == pytest.approx(estimate.model_tflops_full / 989)


def test_step_seconds_is_the_total() -> None:
    cluster = Cluster(gpu("H100"), 128)
    fast = step_seconds(SPEC, LAYOUT, cluster, backend("megatron-fused"))
    assert fast == step().total


def test_a_profile_scales_its_part() -> None:
    plain = step(profile=Profile())
    slow = step(profile=Profile(compute=2.0))
    chatty = step(profile=Profile(communication=2.0))
    assert slow.compute == pytest.approx(2 * plain.compute)
    assert slow.tp_comm == pytest.approx(plain.tp_comm)
    assert chatty.tp_comm == pytest.approx(2 * plain.tp_comm)
    assert chatty.compute == pytest.approx(plain.compute)


def test_interleaving_divides_the_bubble() -> None:
    one = step()
    five = step(replace(LAYOUT, virtual_stages=5))
    assert five.bubble == pytest.approx(one.bubble / 5, rel=0.1)
    assert one.bubble / (one.total - one.overhead) == pytest.approx(3 / (64 + 3), rel=0.15)


def test_recomputation_never_makes_a_step_faster() -> None:
    for name in backend_names():
        for layout in (LAYOUT, Layout(dp=8, global_batch=8, zero_stage=3, seq_len=512)):
            none = step(layout, name).total
            selective = step(replace(layout, recompute="selective"), name).total
            full = step(replace(layout, recompute="full"), name).total
            assert none <= selective <= full


def test_gemm_efficiency_sees_tiles_waves_and_alignment() -> None:
    assert gemm_efficiency(8192, 8192, 8192, 108) > 0.93
    assert gemm_efficiency(8192, 8192, 8192, 108) > gemm_efficiency(8192, 8192, 256, 108)
    # one tile more than a wave costs a second wave
    assert gemm_efficiency(128 * 108, 128, 4096, 108) > gemm_efficiency(128 * 109, 128, 4096, 108)
    # a row beyond a tile costs the tile
    assert gemm_efficiency(1024, 1024, 4096, 108) > gemm_efficiency(1025, 1025, 4096, 108)
    assert gemm_efficiency(4096, 4096, 4096, 108) > gemm_efficiency(4096, 4100, 4096, 108)


def test_collectives_match_the_measured_table_they_come_from() -> None:
    """8x B200 all-reduce, ml-engineering network README: bus bandwidth at 64 MiB to 2 GiB."""
    g = group(Cluster(gpu("B200"), 8), 8, 1)
    for mib, busbw in ((64, 401e9), (256, 646e9), (2048, 735e9)):
        size = mib * 2**20
        assert 2 * 7 / 8 * size / all_reduce_seconds(g, size) == pytest.approx(busbw, rel=0.25)


def test_hierarchical_gather_uses_every_nic_of_a_node() -> None:
    cluster = Cluster(gpu("H100"), 64)
    eight = group(cluster, 64, 1)
    one = group(cluster, 8, 8)
    assert (eight.per_node, one.per_node) == (8, 1)
    size = 8e9
    ratio = gather_seconds(one, size) / gather_seconds(eight, size)
    assert ratio == pytest.approx(8, rel=0.05)


def test_long_sequences_spend_more_in_attention() -> None:
    short = layer_time_of(SPEC, LAYOUT, gpu("H100"), backend("megatron-fused"))
    long = layer_time_of(
        SPEC, replace(LAYOUT, seq_len=32768), gpu("H100"), backend("megatron-fused")
    )
    assert long.gemm_fwd == pytest.approx(8 * short.gemm_fwd, rel=0.05)
    assert long.attention_fwd > 40 * short.attention_fwd


def test_offload_traffic_grows_with_micro_batches_for_parameters_only() -> None:
    cluster = Cluster(gpu("H100"), 8)
    b = backend("fastllm")
    spec = preset("llama-2-7b")
    times = {}
    for offload in ("optimizer", "optimizer+params"):
        for batch in (8, 32):
            layout = Layout(dp=8, zero_stage=3, global_batch=batch, offload=offload)  # type: ignore[arg-type]
            times[offload, batch] = estimate_step(spec, layout, cluster, b).offload
    assert times["optimizer", 8] == times["optimizer", 32] > 0
    assert times["optimizer+params", 32] > times["optimizer+params", 8]


def test_a_cpu_plan_has_a_time() -> None:
    spec = preset("llama-10m")
    layout = Layout(dp=2, global_batch=16, micro_batch=4, seq_len=256, dtype="fp32")
    estimate = estimate_step(spec, layout, Cluster(gpu("cpu"), 2), backend("fastllm"))
    assert 0.05 < estimate.total < 60


def test_flash_attention_runs_at_its_published_rate() -> None:
    """FA2 on A100, causal, head width 128, 16k: 4 + 10 x 4/4 units of work at 189 TFLOP/s
    (arXiv:2307.08691 figure 5, forward and backward together)."""
    spec = replace(preset("llama-2-7b"), hidden=2048, heads=16, kv_heads=16)
    layout = Layout(seq_len=16384)
    t = layer_time_of(spec, layout, gpu("A100"), backend("fsdp"))
    forward = 4 * 16384**2 * 2048 / 2
    rate = 3.5 * forward / (t.attention_fwd + t.attention_bwd)
    assert rate / gpu("A100").sustained == pytest.approx(189e12, rel=0.05)


def test_early_stop_skips_the_last_projection() -> None:
    layout = Layout(dp=8, global_batch=64, zero_stage=3, recompute="full", seq_len=4096)
    cluster = Cluster(gpu("H100"), 8)
    stops = backend("fsdp")
    plain = replace(stops, early_stop=False)
    early = estimate_step(SPEC, layout, cluster, stops, Profile()).recompute
    whole = estimate_step(SPEC, layout, cluster, plain, Profile()).recompute
    # of the products' 28672 / 104448; attention and elementwise work are repeated all the same
    assert 0.18 < 1 - early / whole < 28672 / (2 * 8192 + 2 * 1024 + 3 * 28672)


def test_hidden_communication_still_costs_multiprocessors() -> None:
    """FSDP that hides everything is still slower than no communication at all."""
    layout = Layout(dp=8, global_batch=8, zero_stage=3, seq_len=8192)
    cluster = Cluster(gpu("H100"), 8)
    hides = replace(backend("fsdp"), zero3_overlap=1.0)
    shows = replace(backend("fsdp"), zero3_overlap=0.0)
    hidden = estimate_step(SPEC, layout, cluster, hides, Profile()).dp_comm
    shown = estimate_step(SPEC, layout, cluster, shows, Profile()).dp_comm
    assert hidden == pytest.approx(0.15 * shown)


def test_an_odd_vocabulary_costs_what_padding_saves() -> None:
    """50257 rows cannot be loaded aligned; a stack that pads to 50304 does not notice."""
    odd, even = replace(SPEC, vocab=50257), replace(SPEC, vocab=50304)
    layout, cluster = Layout(dp=8, global_batch=64, micro_batch=2), Cluster(gpu("H100"), 8)

    def head(spec: ArchSpec, name: str) -> float:
        return layer_time_of(spec, layout, cluster.device, backend(name)).head

    assert head(odd, "nanotron") > 2 * head(even, "nanotron")
    assert head(odd, "megatron-fused") == head(even, "megatron-fused")
    on_ampere = layer_time_of(odd, layout, gpu("A100"), backend("nanotron")).head
    padded = layer_time_of(even, layout, gpu("A100"), backend("nanotron")).head
    assert 1.3 < on_ampere / padded < head(odd, "nanotron") / head(even, "nanotron")


def test_gathering_tensor_by_tensor_collapses_at_scale() -> None:
    """SC21 table 2: a step of 175B took 81.6 s on 384 A100, and 66.7 s on 768 and on 1536."""
    spec = preset("gpt3-175b")

    def seconds(gpus: int) -> float:
        layout = Layout(
            dp=gpus, zero_stage=3, micro_batch=1536 // gpus, global_batch=1536, recompute="full",
            dtype="fp16", flash=False,
        )  # fmt: skip
        cluster = Cluster(gpu("A100-80G"), gpus)
        return step_seconds(spec, layout, cluster, backend("megatron-deepspeed"), Profile())

    assert 0.7 < seconds(384) / 81.6 < 1.3
    assert seconds(1536) > 0.7 * seconds(768)


def test_shards_are_gathered_once_a_step_in_a_pipeline() -> None:
    spec, stack = preset("llama-3.1-405b"), backend("fsdp-compiled")
    cluster = Cluster(gpu("H100-96G"), 512)
    one = Layout(dp=8, tp=8, pp=8, zero_stage=3, micro_batch=4, global_batch=256, seq_len=8192,
                 recompute="full", sequence_parallel=True)  # fmt: skip
    many = replace(one, global_batch=1024)
    few, lots = (estimate_step(spec, layout, cluster, stack, Profile()) for layout in (one, many))
    assert lots.dp_comm == pytest.approx(few.dp_comm)


def test_ring_attention_is_slower_where_the_stack_says_so() -> None:
    spec, cluster = preset("llama-3-8b"), Cluster(gpu("H100"), 8)
    layout = Layout(dp=1, cp=8, zero_stage=3, global_batch=1, seq_len=131072, recompute="full")
    lossy = estimate_step(spec, layout, cluster, backend("fsdp"), Profile())
    smooth = estimate_step(
        spec, layout, cluster, replace(backend("fsdp"), ring_loss=0.0), Profile()
    )
    assert smooth.cp_comm < lossy.cp_comm
