"""Bytes per rank and pipeline stage: model states, activations, transients, runtime overhead.

Formulas: Korthikanti et al. arXiv:2205.05198 (activations, in-flight micro-batches), Rajbhandari et
al. arXiv:1910.02054 (ZeRO), Megatron-LM theoretical_memory_usage (distributed optimizer). What a
stack adds to them comes from its ``Backend``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

from fastllm_planner.arch import ArchSpec
from fastllm_planner.backends import Backend
from fastllm_planner.hardware import GIB, Cluster
from fastllm_planner.layout import Layout
from fastllm_planner.model_sums import ModelSums, model_sums, vocab_rows
from fastllm_planner.offload import host_and_nvme_bytes

# Share of the allocator's cache that cannot be given back when memory runs out (it splits blocks).
IRREDUCIBLE_FRAGMENTATION = 0.5
# Resident size of a process that imported torch and DeepSpeed, without any tensor.
CPU_RUNTIME_GIB = 0.7


@dataclass(frozen=True)
class StageMemory:
    """Bytes that one rank of pipeline stage ``stage`` needs at its peak.

    ``gradients`` is while they are made, ``step_gradients`` what is left of them in the step.
    Transients exist only at the peak they cause: ``logits`` and ``workspace`` in the backward pass,
    ``optimizer_temporaries`` in the optimizer step; ``peak_in`` says which peak is the larger.
    ``allocated`` is what torch's allocator reports as its maximum; ``total`` is what nvidia-smi
    shows and what has to fit.
    """

    stage: int
    layers: int
    weights: float
    gradients: float
    step_gradients: float
    optimizer: float
    activations: float
    logits: float
    workspace: float
    gathered_layers: float
    comm_buffers: float
    optimizer_temporaries: float
    fragmentation_share: float
    overhead: float
    lazy_gradients: bool

    @property
    def states(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def backward_peak(self) -> float:
        """At the loss (all activations) or later (gradients complete), whichever is larger."""
        if not self.lazy_gradients:
            transient = max(self.logits, self.workspace)
            return self.states + self.activations + transient + self.gathered_layers
        fixed = self.weights + self.optimizer + self.gathered_layers
        later = max(self.activations, self.gradients) + self.workspace
        return fixed + max(self.activations + self.logits, later)

    @property
    def optimizer_peak(self) -> float:
        return self.weights + self.step_gradients + self.optimizer + self.optimizer_temporaries

    @property
    def peak_in(self) -> str:
        return "backward" if self.backward_peak >= self.optimizer_peak else "optimizer step"

    @property
    def allocated(self) -> float:
        return max(self.backward_peak, self.optimizer_peak) + self.comm_buffers

    @property
    def fragmentation(self) -> float:
        """Bytes that the allocator caches without a use."""
        return self.fragmentation_share * self.allocated

    @property
    def total(self) -> float:
        return self.allocated * (1.0 + self.fragmentation_share) + self.overhead

    @property
    def required(self) -> float:
        """What the device must have: before it fails, the allocator gives back unused cache."""
        share = 1.0 + IRREDUCIBLE_FRAGMENTATION * self.fragmentation_share
        return self.allocated * share + self.overhead


@dataclass(frozen=True)
class MemoryEstimate:
    """All stages of one layout. ``host_bytes`` and ``nvme_bytes``: per node, with offload."""

    stages: tuple[StageMemory, ...]
    host_bytes: float
    nvme_bytes: float

    @property
    def worst(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def peak(self) -> float:
        """Bytes of the fullest rank, runtime overhead included."""
        return self.worst.total

    @property
    def allocated_peak(self) -> float:
        """What ``torch.cuda.max_memory_allocated`` would show on the fullest rank."""
        return max(stage.allocated for stage in self.stages)

    @property
    def required(self) -> float:
        """Bytes without which the job fails."""
        return max(stage.required for stage in self.stages)

    def fits(self, cluster: Cluster) -> bool:
        host, nvme = cluster.host_memory_bytes, cluster.nvme_bytes
        host_ok = host is None or self.host_bytes <= host
        nvme_ok = self.nvme_bytes <= (nvme or 0)
        return self.required <= cluster.device.memory_bytes and host_ok and nvme_ok


@lru_cache(maxsize=4096)
def stage_layers(layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each stage: even, or the remainder on the stages without embedding or head first.

    70 layers on 12 stages are 5, 6 x 10, 5: what BLOOM got by counting the two ends as layers.
    """
    base, extra = divmod(layers, pp)
    order = [*range(1, pp - 1), 0, pp - 1]
    larger = set(order[:extra])
    return tuple(base + (stage in larger) for stage in range(pp))


def in_flight(layout: Layout, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once, in units of its own layers.

    1F1B: min(m, p - stage). Interleaved (Megatron): 2(p-stage-1) + (v-1)p + 1 chunks of 1/v.
    """
    p, v, m = layout.pp, layout.virtual_stages, layout.micro_batches
    if v == 1:
        return float(min(m, p - stage))
    chunks = min(m * v, 2 * (p - stage - 1) + (v - 1) * p + 1)
    return chunks / v


def saved_bytes_per_token(spec: ArchSpec, layout: Layout, backend: Backend) -> float:
    """Activation bytes that one layer keeps per token of this rank's sequence shard.

    Without recomputation: norm inputs and outputs (``saved_per_hidden`` x h, split only by sequence
    parallelism), q, k, v, attention output and the MLP's (split by tensor parallelism).
    """
    whole = _saved_by_layer(spec, layout, backend)
    if layout.recompute == "none":
        if layout.flash:
            return whole
        return whole + backend.activation_multiplier * _scores(spec, layout, backend)
    sequence = layout.tp if layout.sequence_parallel else 1
    boundary = 2.0 * spec.hidden / sequence
    if layout.recompute == "full":
        kept = boundary
    elif backend.selective == "half":
        # the layer input, the attention output and half of the matrix products' outputs
        products = 2.0 * spec.q_size + 4.0 * spec.kv_size
        products += 2.0 * (spec.mlp_matrices - 1) * _mlp_width(spec)
        kept = boundary + (2.0 * spec.q_size + products / 2) / layout.tp + 2.0 * spec.hidden
    else:
        kept = whole
    return layout.recompute_share * kept + (1.0 - layout.recompute_share) * whole


def _mlp_width(spec: ArchSpec) -> float:
    """MLP width that one token passes through."""
    if spec.moe is None:
        return float(spec.ffn_hidden)
    return float(spec.moe.active_experts * spec.moe.ffn_hidden + spec.moe.shared_ffn_hidden)


def _scores(spec: ArchSpec, layout: Layout, backend: Backend) -> float:
    """Bytes per token of one layer's attention scores, where they are kept."""
    return backend.scores_bytes * spec.heads * layout.seq_len / layout.tp


def _saved_by_layer(spec: ArchSpec, layout: Layout, backend: Backend) -> float:
    h, tp = spec.hidden, layout.tp
    wide = 4.0 * spec.q_size + 4.0 * spec.kv_size
    per_width = 2.0 * spec.mlp_matrices + backend.saved_mlp_extra
    kept = backend.saved_per_hidden * h / (tp if layout.sequence_parallel else 1)
    if backend.saves_gathered and layout.sequence_parallel:
        kept += 4.0 * h * (1.0 - 1.0 / tp)
    kept += (wide + per_width * _mlp_width(spec)) / tp
    if spec.moe is not None:
        # The first expert product saves its permuted input, k rows of h per token, and the
        # weighted sum saves the expert outputs; tensor parallelism splits neither.
        kept += 4.0 * spec.moe.active_experts * h
    return kept * backend.activation_multiplier


def _layer_workspace(spec: ArchSpec, layout: Layout, backend: Backend, tokens: float) -> float:
    """Live bytes while one layer runs backward: its gradients, and recomputed activations."""
    h, tp = spec.hidden, layout.tp
    width = spec.ffn_hidden if spec.moe is None else spec.moe.ffn_hidden
    gate = spec.mlp_matrices - 1
    live = 2.0 * spec.mlp_matrices * width / tp * tokens + 2.0 * gate * h * width / tp
    if layout.recompute == "full":
        live += tokens * _saved_by_layer(spec, layout, backend)
    if layout.recompute != "none" and not layout.flash:
        live += tokens * _scores(spec, layout, backend)
    return live


def _padded_vocab(spec: ArchSpec, tp: int) -> float:
    """Vocabulary rows per rank; Megatron pads to a multiple of 128*tp."""
    return float(spec.vocab) if tp == 1 else vocab_rows(spec, tp)


def _stage_params(
    sums: ModelSums, spec: ArchSpec, layout: Layout, stage: int
) -> tuple[float, float]:
    """Parameters a rank of the stage holds: (all, of them in experts)."""
    tp, ep, pp = layout.tp, layout.ep, layout.pp
    counts = stage_layers(spec.layers, pp)
    first = sum(counts[:stage])
    held = sums.held_by_layers(first, counts[stage], tp, ep)
    experts = 0.0
    if sums.moe is not None:
        moe_layers = max(0, first + counts[stage] - max(first, sums.dense_layers))
        experts = moe_layers * sums.moe.experts / (tp * ep)
    rows = _padded_vocab(spec, tp) * spec.hidden
    if stage == 0:
        held += rows + sums.positions
    if stage == pp - 1:
        held += sums.final_norm
        if not sums.tied or pp > 1:
            held += rows
    return held, experts


def _engine_for(layout: Layout, backend: Backend) -> Backend:
    """The stack with the figures of the engine that trains ``layout``."""
    if not backend.second_engine or layout.offload != "none" or layout.dtype == "fp16":
        return backend
    cut = layout.zero_stage > 1 and layout.shard_size > 1
    return backend if cut else _second_engine(backend, layout.dtype == "bf16")


@cache
def _second_engine(backend: Backend, bf16: bool) -> Backend:
    values = dict(backend.second_engine)
    if not bf16:
        values["optimizer_bytes"] = backend.optimizer_bytes
    return replace(backend, **values)


def stage_memory(
    spec: ArchSpec, layout: Layout, cluster: Cluster, backend: Backend, stage: int
) -> StageMemory:
    """Memory of one rank of one pipeline stage."""
    backend = _engine_for(layout, backend)
    sums = model_sums(spec)
    held, experts = _stage_params(sums, spec, layout, stage)
    weights, gradients, optimizer = _states(layout, backend, held, experts)
    layers = stage_layers(spec.layers, layout.pp)[stage]
    tokens = layout.micro_batch * layout.seq_len / layout.cp
    saved = saved_bytes_per_token(spec, layout, backend) * tokens
    activations = saved * layers * in_flight(layout, stage)
    step_gradients = gradients
    if backend.reduce_bucket and layout.zero_stage in (1, 2) and layout.shard_size > 1:
        # The rank's averaged part outlives the buckets, and in ZeRO-1 the gradients themselves.
        step_gradients = backend.grad_bytes * optimizer / backend.optimizer_bytes
        gradients = _reduced_gradients(layout, gradients, step_gradients, saved * layers, stage)
        # ZeRO-1 makes a bucket beside the one of the micro-batch before.
        buckets = 2.0 if layout.zero_stage == 1 and layout.micro_batches > 1 else 1.0
        gradients += buckets * backend.grad_bytes * min(backend.reduce_bucket, held)
    sp = layout.tp if layout.sequence_parallel else 1
    boundary = 2.0 * spec.hidden * tokens / sp
    buffers = backend.stage_buffers * boundary * in_flight(layout, stage) if layout.pp > 1 else 0.0
    logits = 0.0
    if stage == layout.pp - 1:
        rows = _padded_vocab(spec, layout.tp)
        logits = backend.logits_bytes * rows * tokens + 2.0 * rows * spec.hidden
    gathered = 0.0
    if (
        layout.zero_stage == 3
        and layout.pp == 1
        and (layout.shard_size > 1 or layout.offload == "optimizer+params")
    ):
        # two layers' bf16 weights (the next one is prefetched) and one layer's gradients
        per_param = 4.0 + backend.grad_reduce_bytes
        largest = float(sums.largest_layer)
        if backend.live_params:  # no part is smaller than a third of a layer
            largest = min(largest, max(backend.live_params, largest / 3))
        if layout.offload == "optimizer+params":  # nothing else of the ends is on the device
            largest = max(largest, sums.embedding, sums.head)
        gathered = per_param * largest / layout.tp
    workspace = _layer_workspace(spec, layout, backend, tokens)
    temporaries = backend.optimizer_temp_bytes * optimizer / backend.optimizer_bytes
    runtime = CPU_RUNTIME_GIB if cluster.gpu.architecture == "cpu" else backend.context_gib
    return StageMemory(
        stage=stage,
        layers=layers,
        weights=weights,
        gradients=gradients,
        step_gradients=step_gradients,
        optimizer=optimizer,
        activations=activations,
        logits=logits,
        workspace=workspace,
        gathered_layers=gathered,
        comm_buffers=buffers,
        optimizer_temporaries=temporaries,
        fragmentation_share=backend.fragmentation,
        overhead=runtime * GIB,
        lazy_gradients=backend.lazy_gradients and layout.micro_batches == 1,
    )


def _reduced_gradients(
    layout: Layout, gradients: float, averaged: float, activations: float, stage: int
) -> float:
    """Gradient bytes at the peak, without buckets. What is reduced in the same micro-batch is not
    kept. ZeRO-1 makes the averaged part in the last one, when the ``activations`` of the others in
    flight are gone."""
    if layout.micro_batches == 1:
        return averaged
    if layout.zero_stage == 2:
        return max(gradients, averaged)
    return gradients + max(0.0, averaged - activations * (in_flight(layout, stage) - 1.0))


def _states(
    layout: Layout, backend: Backend, held: float, experts: float
) -> tuple[float, float, float]:
    """Bytes of weights, gradients and optimizer states after ZeRO and offload."""
    shard = layout.shard_size
    expert_shard = max(1.0, shard / layout.ep)
    divided = (held - experts) / shard + experts / expert_shard
    zero = layout.zero_stage
    if zero == 3 and layout.pp > 1:
        zero = 2  # between micro-batches of a pipeline nothing is resharded
    weights = backend.weight_bytes * (divided if zero >= 3 else held)
    if backend.fp32_shard and zero == 2:
        # grad_op: fp32 shards plus a whole bf16 copy that stays gathered after the forward pass
        weights = backend.weight_bytes * divided + 2.0 * held
    grad_bytes = backend.grad_bytes
    if layout.dtype == "bf16" and zero <= 1:
        grad_bytes += backend.bf16_extra_grad_bytes
    whole = zero < 2 or (layout.pp > 1 and backend.fp32_shard)  # reduced after the last micro-batch
    gradients = grad_bytes * (held if whole else divided)
    optimizer = backend.optimizer_bytes * (divided if zero >= 1 else held)
    if layout.offload != "none":
        optimizer = 0.0
        gradients = 2.0 * divided if zero < 2 else 0.0
    if layout.offload == "optimizer+params":
        weights = 0.0
    return weights, gradients, optimizer


def estimate_memory(
    spec: ArchSpec, layout: Layout, cluster: Cluster, backend: Backend
) -> MemoryEstimate:
    """Memory of every stage of a layout."""
    stages = tuple(stage_memory(spec, layout, cluster, backend, i) for i in range(layout.pp))
    return MemoryEstimate(stages, *host_and_nvme_bytes(spec, layout, cluster))


def peak_bytes(spec: ArchSpec, layout: Layout, cluster: Cluster, backend: Backend) -> float:
    """``estimate_memory(...).required`` from the stages that can hold it (fast)."""
    stages = {0, layout.pp - 1}
    if layout.pp > 2 and spec.layers % layout.pp:
        stages.add(1)  # holds a layer more than the ends
    if spec.moe is not None and spec.moe.first_dense_layers:
        # stages of dense layers are light: the first stage of experts alone may be the fullest
        start = 0
        for stage, layers in enumerate(stage_layers(spec.layers, layout.pp)):
            stages.add(stage)
            if start >= spec.moe.first_dense_layers:
                break
            start += layers
    return max(stage_memory(spec, layout, cluster, backend, i).required for i in stages)
