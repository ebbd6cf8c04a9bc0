"""Seconds of one optimizer step: operators, exposed communication, pipeline bubble, optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fastllm_planner.arch import ArchSpec
from fastllm_planner.backends import Backend
from fastllm_planner.communication import (
    all_reduce_seconds,
    all_to_all_seconds,
    gather_seconds,
    group,
    send_seconds,
)
from fastllm_planner.efficiency import default_profile, interval
from fastllm_planner.flops import hardware_flops_per_token, model_flops_per_token
from fastllm_planner.hardware import Cluster
from fastllm_planner.kernels import LayerTime, layer_time_of
from fastllm_planner.layout import Layout
from fastllm_planner.memory import stage_layers
from fastllm_planner.model_sums import model_sums
from fastllm_planner.offload import offload_seconds
from fastllm_planner.profile import Profile

# Slower steps with more nodes: stragglers and jitter. dgxc: 1-3 % from 1 to 256 nodes.
JITTER_PER_DOUBLING = 0.002
# Bytes the optimizer moves per parameter it owns: gradient 4, master+moments read and written 24,
# bf16 weight written 2.
OPTIMIZER_BYTES_MOVED = 30.0
# A collective that runs beside compute takes about 15 % of the multiprocessors (system tables of
# calculon-ai/calculon @caa4b11): hidden time is not free.
CONTENTION = 0.15
# Transformer Engine gathers fp8 activations as fp8 and scatters sums in bf16: (1 + 2) / 4 bytes.
FP8_TP_SHARE = 0.75


@dataclass(frozen=True)
class StepEstimate:
    """Seconds by cause; they add up to ``total``. Communication is what is *not* hidden.

    ``low``/``high`` bound ``total``: four in five steps should fall between (``interval``).
    """

    compute: float
    recompute: float
    tp_comm: float
    cp_comm: float
    ep_comm: float
    pp_comm: float
    dp_comm: float
    bubble: float
    optimizer: float
    offload: float
    overhead: float
    total: float
    low: float
    high: float
    tokens_per_step: float
    devices: int
    model_tflops_full: float
    model_tflops_causal: float
    hardware_tflops: float
    peak_tflops: float

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.tokens_per_step / self.total / self.devices

    def mfu(self, convention: str = "full") -> float:
        """Model FLOPs per second over the bf16 (V100: fp16) dense datasheet peak, 0 to 1."""
        causal = convention == "causal"
        return (self.model_tflops_causal if causal else self.model_tflops_full) / self.peak_tflops


class _LayerParts(NamedTuple):
    """Seconds that one layer adds to one micro-batch on one rank, by cause."""

    compute: float
    recompute: float
    tp: float
    cp: float
    ep: float
    zero3: float
    launch: float

    @property
    def total(self) -> float:
        return (
            self.compute + self.recompute + self.tp + self.cp + self.ep + self.zero3 + self.launch
        )


def _recomputed(layout: Layout, backend: Backend, t: LayerTime) -> float:
    """Extra forward seconds per layer."""
    if layout.recompute == "full":
        skipped = t.down_fwd if backend.early_stop else 0.0
        return (t.forward - skipped) * layout.recompute_share
    if layout.recompute == "selective":
        if backend.selective == "half":
            return (t.gemm_fwd / 2 + t.elementwise_fwd) * layout.recompute_share
        return t.attention_fwd * layout.recompute_share
    return 0.0


def _tp_seconds(spec: ArchSpec, layout: Layout, cluster: Cluster, backend: Backend) -> float:
    """Exposed tensor-parallel communication of one layer, forward and backward."""
    if layout.tp == 1:
        return 0.0
    g = group(cluster, layout.tp, 1)
    size = 2.0 * layout.micro_batch * layout.seq_len / layout.cp * spec.hidden
    passes = 4.0 + (2.0 if layout.recompute == "full" else 0.0)
    seconds = passes * all_reduce_seconds(g, size)
    if layout.sequence_parallel:
        # backward gathers the norm outputs again: one all-gather per linear block
        seconds += 2.0 * gather_seconds(g, size)
        if layout.dtype == "fp8":
            seconds *= FP8_TP_SHARE
    return seconds * (1.0 - backend.tp_overlap) / backend.collective_efficiency


def _cp_seconds(
    spec: ArchSpec, layout: Layout, cluster: Cluster, backend: Backend, t: LayerTime
) -> float:
    """Ring attention: k and v travel c-1 times forward, with gradients backward."""
    if layout.cp == 1:
        return 0.0
    g = group(cluster, layout.cp, layout.tp)
    size = 2.0 * layout.micro_batch * layout.seq_len * 2.0 * spec.kv_size / layout.tp
    forward = gather_seconds(g, size)
    exposed = max(0.0, forward - t.attention_fwd) + max(0.0, 2.0 * forward - t.attention_bwd)
    passes = t.attention_fwd * (2.0 if layout.recompute == "full" else 1.0) + t.attention_bwd
    return exposed + backend.ring_loss * (1.0 - 1.0 / layout.cp) * passes


def _ep_seconds(spec: ArchSpec, layout: Layout, cluster: Cluster, backend: Backend) -> float:
    """Dispatch and combine, forward and backward, of one MoE layer (averaged over all layers)."""
    moe = spec.moe
    if moe is None or layout.ep == 1:
        return 0.0
    g = group(cluster, layout.ep, layout.tp)
    tokens = layout.micro_batch * layout.seq_len / layout.cp / layout.tp
    size = 2.0 * tokens * moe.active_experts * spec.hidden
    share = 1.0 - min(moe.first_dense_layers, spec.layers) / spec.layers
    return 4.0 * all_to_all_seconds(g, size) * share * (1.0 - backend.ep_overlap)


def _zero3_seconds(
    spec: ArchSpec, layout: Layout, cluster: Cluster, backend: Backend, busy: float
) -> float:
    """Exposed gathers (forward, backward) and gradient scatter of one layer and micro-batch."""
    if layout.zero_stage < 3 or layout.shard_size == 1 or layout.pp > 1:
        return 0.0  # in a pipeline shards are gathered once a step: _dp_seconds
    g = group(cluster, layout.shard_size, layout.tp)
    params = model_sums(spec).held(layout.tp, layout.ep) / spec.layers
    seconds = 2.0 * gather_seconds(g, 2.0 * params)
    seconds += gather_seconds(g, backend.grad_reduce_bytes * params)
    seconds /= backend.collective_efficiency
    # gathered and scattered tensor by tensor: a ring latency each
    seconds += 3.0 * (backend.zero3_calls - 1.0) * gather_seconds(g, 1.0)
    exposed = max(seconds - backend.zero3_overlap * busy, (1 - backend.zero3_overlap) * seconds)
    return exposed + CONTENTION * (seconds - exposed)


def _layer_parts(
    spec: ArchSpec,
    layout: Layout,
    cluster: Cluster,
    backend: Backend,
    profile: Profile,
    t: LayerTime,
) -> _LayerParts:
    slow, comm = profile.compute, profile.communication
    busy = (t.forward + t.backward) * slow
    rate = cluster.device.memory_bandwidth * backend.memory_efficiency
    accumulate = 0.0
    if layout.micro_batches > 1:
        held = model_sums(spec).held(layout.tp, layout.ep) / spec.layers
        accumulate = backend.accumulate_bytes * held / rate
    # Small kernels wait for the host: forward, and backward at twice that, per layer.
    host = backend.layer_overhead_us if spec.moe is None else backend.moe_layer_overhead_us
    launch = 3e-6 * host if cluster.device.architecture != "cpu" else 0.0
    return _LayerParts(
        compute=busy + accumulate * slow,
        recompute=_recomputed(layout, backend, t) * slow,
        tp=_tp_seconds(spec, layout, cluster, backend) * comm,
        cp=_cp_seconds(spec, layout, cluster, backend, t) * comm,
        ep=_ep_seconds(spec, layout, cluster, backend) * comm,
        zero3=_zero3_seconds(spec, layout, cluster, backend, busy) * comm,
        launch=max(0.0, launch - busy),
    )


def _pipeline_sends(spec: ArchSpec, layout: Layout, cluster: Cluster, backend: Backend) -> float:
    """Exposed point-to-point seconds per micro-batch (forward and backward, every chunk)."""
    if layout.pp == 1:
        return 0.0
    size = 2.0 * layout.micro_batch * layout.seq_len / layout.cp * spec.hidden
    if layout.sequence_parallel:
        size /= layout.tp
    inside = layout.dp * layout.tp * layout.cp * 2 <= cluster.fabric_size
    seconds = 2.0 * send_seconds(cluster, size, same_node=inside) * layout.virtual_stages
    return seconds * (1.0 - backend.pp_overlap)


def _dp_seconds(
    spec: ArchSpec, layout: Layout, cluster: Cluster, backend: Backend, window: float
) -> float:
    """Gradient reduction and (ZeRO-1/2) parameter gathering that ``window`` seconds do not hide."""
    ranks = layout.dp * layout.cp
    if ranks == 1 or (layout.zero_stage >= 3 and layout.pp == 1):
        return 0.0
    sums = model_sums(spec)
    params = sums.held(layout.tp, layout.ep) / layout.pp
    params += (sums.embedding + (0 if sums.tied else sums.head)) / layout.tp / min(layout.pp, 2)
    reduce_group = group(cluster, ranks, layout.tp)
    grads = backend.grad_reduce_bytes * params
    if layout.zero_stage == 0:
        seconds = all_reduce_seconds(reduce_group, grads)
    else:
        shard_group = group(cluster, layout.shard_size, layout.tp)
        seconds = gather_seconds(reduce_group, grads) + gather_seconds(shard_group, 2.0 * params)
        if layout.shard_size < ranks:
            seconds += gather_seconds(reduce_group, grads)
        # gathered tensor by tensor after the step: one ring latency each
        calls = (backend.dp_calls - 1.0) * spec.layers / layout.pp
        seconds += calls * gather_seconds(shard_group, 1.0)
    hidden = backend.dp_overlap * min(seconds, window)
    return seconds - hidden + CONTENTION * hidden


def _optimizer_seconds(spec: ArchSpec, layout: Layout, cluster: Cluster) -> tuple[float, float]:
    """Seconds of the update on the device, and of host work and transfers with offload."""
    if layout.offload != "none":
        return 0.0, offload_seconds(spec, layout, cluster)
    shard = layout.shard_size if layout.zero_stage >= 1 else 1
    owned = model_sums(spec).total / layout.tp / layout.pp / shard
    return OPTIMIZER_BYTES_MOVED * owned / (cluster.device.memory_bandwidth * 0.7), 0.0


class _Step(NamedTuple):
    """One step before it is told by cause: what a search needs is ``total``."""

    parts: _LayerParts
    layers: int
    head: float
    sends: float
    bubble: float
    dp: float
    optimizer: float
    offload: float
    busy: float
    total: float


def _step(
    spec: ArchSpec, layout: Layout, cluster: Cluster, backend: Backend, profile: Profile
) -> _Step:
    """m micro-batches of the slowest stage, the filling and draining of the others (1F1B; 1/v of
    it interleaved, arXiv:2104.04473), and what follows the last micro-batch."""
    t = layer_time_of(spec, layout, cluster.device, backend)
    parts = _layer_parts(spec, layout, cluster, backend, profile, t)
    m, p = layout.micro_batches, layout.pp
    per_layer, head = parts.total, t.head * profile.compute
    counts = stage_layers(spec.layers, p)
    layers, slow_head = max(counts), 0.0
    if counts[-1] * per_layer + head >= layers * per_layer:
        layers, slow_head = counts[-1], head
    sends = _pipeline_sends(spec, layout, cluster, backend) * profile.communication
    mean = (per_layer * spec.layers + head) / p + sends
    bubble = (p - 1) * mean / layout.virtual_stages
    # With several stages the backward passes of the last micro-batch are staggered.
    window = layers * parts.compute * (1.0 if p == 1 else 0.7) / profile.communication
    dp = _dp_seconds(spec, layout, cluster, backend, window) * profile.communication
    optimizer, offload = _optimizer_seconds(spec, layout, cluster)
    busy = m * (layers * per_layer + slow_head + sends) + bubble + dp + optimizer + offload
    busy += backend.step_overhead_ms * 1e-3
    total = busy * (1.0 + JITTER_PER_DOUBLING * (cluster.nodes - 1).bit_length())
    return _Step(parts, layers, slow_head, sends, bubble, dp, optimizer, offload, busy, total)


def estimate_step(
    spec: ArchSpec,
    layout: Layout,
    cluster: Cluster,
    backend: Backend,
    profile: Profile | None = None,
) -> StepEstimate:
    """Seconds of one optimizer step and what they are made of.

    ``profile`` None takes the shipped one of this (device, backend).
    """
    profile = profile or default_profile(cluster.gpu.name, backend.name)
    step = _step(spec, layout, cluster, backend, profile)
    parts, total, m = step.parts, step.total, layout.micro_batches
    per_layer = m * step.layers
    tokens = float(layout.global_batch * layout.seq_len)
    rate = tokens / layout.world_size / total / 1e12
    device = cluster.device
    spread = interval(profile, spec, layout, device)
    return StepEstimate(
        compute=per_layer * parts.compute + m * step.head,
        recompute=per_layer * parts.recompute,
        tp_comm=per_layer * parts.tp,
        cp_comm=per_layer * parts.cp,
        ep_comm=per_layer * parts.ep,
        pp_comm=m * step.sends,
        dp_comm=step.dp + per_layer * parts.zero3,
        bubble=step.bubble,
        optimizer=step.optimizer,
        offload=step.offload,
        overhead=per_layer * parts.launch + backend.step_overhead_ms * 1e-3 + total - step.busy,
        total=total,
        low=total * (1.0 - spread),
        high=total * (1.0 + spread),
        tokens_per_step=tokens,
        devices=layout.world_size,
        model_tflops_full=model_flops_per_token(spec, layout.seq_len) * rate,
        model_tflops_causal=model_flops_per_token(spec, layout.seq_len, "causal") * rate,
        hardware_tflops=hardware_flops_per_token(spec, layout.seq_len, layout.recompute) * rate,
        peak_tflops=device.peak("bf16" if device.supports("bf16") else "fp16"),
    )


def step_seconds(
    spec: ArchSpec,
    layout: Layout,
    cluster: Cluster,
    backend: Backend,
    profile: Profile | None = None,
) -> float:
    """``estimate_step(...).total``, without the account of it: what a search ranks by."""
    profile = profile or default_profile(cluster.gpu.name, backend.name)
    return _step(spec, layout, cluster, backend, profile).total
