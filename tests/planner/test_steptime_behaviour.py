"""What published scaling studies saw, and a planner must reproduce."""

from dataclasses import replace

import pytest

from fastllm_planner.arch import ArchSpec, preset
from fastllm_planner.backends import backend
from fastllm_planner.hardware import Cluster, gpu
from fastllm_planner.layout import Layout
from fastllm_planner.profile import Profile
from fastllm_planner.steptime import StepEstimate, estimate_step

NEUTRAL = Profile()


def gpt(hidden: int, layers: int, heads: int, vocab: int = 51200) -> ArchSpec:
    return ArchSpec(
        "gpt2", layers, hidden, heads, heads, hidden // heads, 4 * hidden, vocab, 2048,
        mlp="gelu", norm="layernorm", position="learned", tied_embeddings=True, qkv_bias=True,
        attention_out_bias=True, mlp_bias=True,
    )  # fmt: skip


def run(
    spec: ArchSpec, layout: Layout, device: str, name: str, network: float | None = None
) -> StepEstimate:
    cluster = Cluster(gpu(device), layout.world_size, 8, network)
    return estimate_step(spec, layout, cluster, backend(name), NEUTRAL)


def test_weak_scaling_hides_data_parallel_communication() -> None:
    """8 → 2048 H100 at 400 Gb/s each: 1-3 % slower."""
    base = Layout(dp=4, cp=2, global_batch=128, seq_len=8192)
    small = run(preset("llama-3-8b"), base, "H100", "nemo")
    large = run(preset("llama-3-8b"), replace(base, dp=1024, global_batch=32768), "H100", "nemo")
    assert 1.005 < large.total / small.total < 1.04


BLOOM_NODE = 50e9 / 8  # 4 x Omni-Path 100 Gb/s for 8 A100


def test_tp4_beats_tp8_on_384_a100() -> None:
    """BLOOM's prequel, 181B: 110 s against 134 s (TP8, same micro-batch)."""
    spec = gpt(14336, 72, 64, 250880)
    common = {"micro_batch": 2, "global_batch": 2048, "flash": False, "recompute": "full",
              "dtype": "fp16"}  # fmt: skip
    four = Layout(dp=8, tp=4, pp=12, **common)  # type: ignore[arg-type]
    eight = Layout(dp=4, tp=8, pp=12, **common)  # type: ignore[arg-type]
    name = "megatron-deepspeed"
    ratio = run(spec, eight, "A100", name, BLOOM_NODE).total / (
        run(spec, four, "A100", name, BLOOM_NODE).total
    )
    assert 1.03 < ratio < 1.35


def test_head_dimensions_that_are_no_multiple_of_8_are_slow() -> None:
    """h = 13824: 128 heads (108 wide) took 1.43 x the time of 96 heads (144 wide)."""
    layout = Layout(
        dp=8, tp=4, pp=12, micro_batch=2, global_batch=2048, flash=False, recompute="full",
        dtype="fp16",
    )  # fmt: skip
    slow = run(gpt(13824, 78, 128, 250880), layout, "A100", "megatron-deepspeed", BLOOM_NODE)
    good = run(gpt(13824, 78, 96, 250880), layout, "A100", "megatron-deepspeed", BLOOM_NODE)
    assert slow.total > 1.1 * good.total


def test_one_micro_batch_per_replica_is_almost_pure_bubble() -> None:
    """BLOOM at a global batch of 16: 12 stages, one micro-batch."""
    spec = gpt(14336, 70, 112, 250880)
    layout = Layout(
        dp=8, tp=4, pp=12, micro_batch=2, global_batch=16, flash=False, recompute="full"
    )
    step = run(spec, layout, "A100", "megatron-deepspeed", BLOOM_NODE)
    assert step.bubble > 0.6 * step.total


def test_zero_3_collapses_where_pipelines_do_not() -> None:
    """Narayanan et al. 2021, table 2: 175B, global batch 1536, 384 → 1536 A100: ZeRO-3 without
    model parallelism falls to a third per GPU, tensor and pipeline parallelism hold."""
    spec = gpt(12288, 96, 96)
    common = {"global_batch": 1536, "flash": False, "recompute": "full", "dtype": "fp16"}

    def zero3(gpus: int) -> float:
        layout = Layout(dp=gpus, zero_stage=3, micro_batch=1536 // gpus, **common)  # type: ignore[arg-type]
        return run(spec, layout, "A100", "megatron-deepspeed", 25e9).tokens_per_s_per_gpu

    def model_parallel(gpus: int) -> float:
        layout = Layout(dp=gpus // 96, tp=8, pp=12, zero_stage=0, **common)  # type: ignore[arg-type]
        return run(spec, layout, "A100", "megatron-2021", 25e9).tokens_per_s_per_gpu

    assert zero3(1536) < 0.6 * zero3(384)
    assert model_parallel(1536) > 0.8 * model_parallel(384)
    assert model_parallel(1536) > 1.5 * zero3(1536)
    assert zero3(384) > 0.75 * model_parallel(384)


def test_sharding_inside_the_node_survives_slow_ethernet() -> None:
    """InternEvo on 4 x 100 Gb RoCE, 8 → 1024 GPUs: ZeRO-1 over all ranks loses 44 % of its
    throughput, over the node's 8 ranks 11 %."""
    spec = preset("llama-2-7b")

    def kept(shard: int) -> float:
        def rate(gpus: int) -> float:
            layout = Layout(
                dp=gpus, micro_batch=2, global_batch=gpus * 8, shard_group=shard if gpus > 8 else 0
            )
            return run(spec, layout, "A100", "internevo", 50e9 / 8).tokens_per_s_per_gpu

        return rate(1024) / rate(8)

    assert kept(0) < 0.70
    assert kept(8) > 0.80


def test_price_of_recomputation_in_a_layer() -> None:
    """Korthikanti et al. table 4, 22B: full recomputation costs 39 % of a layer's time,
    selective with sequence parallelism 4 % over the layer without either."""
    spec = gpt(6144, 48, 64)
    base = Layout(tp=8, micro_batch=4, global_batch=4, flash=False)
    none = run(spec, base, "A100", "megatron-2021")
    full = run(spec, replace(base, recompute="full"), "A100", "megatron-2021")
    selective = run(
        spec, replace(base, recompute="selective", sequence_parallel=True), "A100", "megatron-2021"
    )
    assert 0.28 < full.total / none.total - 1 < 0.45
    assert -0.05 < selective.total / none.total - 1 < 0.10


@pytest.mark.parametrize(
    ("device", "network", "low", "high"),
    [("A100", 25e9, 0.40, 0.65), ("H100", 50e9, 0.35, 0.60), ("B200", 50e9, 0.28, 0.55)],
)
def test_mfu_of_a_sound_layout_is_where_published_runs_are(
    device: str, network: float, low: float, high: float
) -> None:
    layout = Layout(
        dp=8, tp=8, pp=4, virtual_stages=5, global_batch=512, seq_len=4096, sequence_parallel=True
    )
    assert low < run(preset("llama-2-70b"), layout, device, "megatron-fused", network).mfu() < high
