"""Seconds of the operators of one layer on one rank: roofline with tile and wave quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fastllm_planner.arch import ArchSpec
from fastllm_planner.backends import Backend
from fastllm_planner.hardware import Gpu, attention_rate
from fastllm_planner.layout import Layout
from fastllm_planner.model_sums import vocab_rows

TILE_M, TILE_N = 128, 128
# A tile's prologue and epilogue take a fixed time, so the contraction length at which it reaches
# half of its rate grows with the rate of one multiprocessor: about 90 on A100, 210 on H100, 320 on
# B200.
HALF_K_PER_TFLOPS = 40.0
# Rows whose bytes are no multiple of 16 cannot be loaded 16 bytes at a time: nanoGPT's vocabulary
# of 50257 -> 50304 made a whole 124M step 25 % faster on A100. Hopper and later fall back further,
# to kernels of older architectures: nanotron's logs with 50257 on H100 lose 0.12 s a micro-batch.
UNALIGNED = 0.45
# Bytes per element of k rows per token that routing moves, forward: gather and write (4), stage for
# and from the all-to-all (4), weighted sum in fp32 (4).
DISPATCH_BYTES = 12.0
UNALIGNED_HEAD = {"hopper": 0.15, "blackwell": 0.15}


@dataclass(frozen=True)
class LayerTime:
    """Seconds per micro-batch of one layer (``*_fwd``) and of the head; backward separately."""

    gemm_fwd: float
    gemm_bwd: float
    attention_fwd: float
    attention_bwd: float
    elementwise_fwd: float
    elementwise_bwd: float
    head_fwd: float
    head_bwd: float
    embedding: float
    down_fwd: float

    @property
    def forward(self) -> float:
        return self.gemm_fwd + self.attention_fwd + self.elementwise_fwd

    @property
    def backward(self) -> float:
        return self.gemm_bwd + self.attention_bwd + self.elementwise_bwd

    @property
    def head(self) -> float:
        return self.head_fwd + self.head_bwd


def gemm_efficiency(m: float, n: float, k: float, sms: int, half_k: float = 96.0) -> float:
    """Share of the ceiling that an m x n x k GEMM reaches: whole tiles and waves, long k, aligned
    rows."""
    tiles_m = -(-m // TILE_M)
    tiles_n = -(-n // TILE_N)
    tile = m * n / (tiles_m * TILE_M * tiles_n * TILE_N)
    tiles = tiles_m * tiles_n
    waves = -(-tiles // sms)
    wave = tiles / (waves * sms)
    aligned = (
        1.0 if n % 64 == 0 and k % 64 == 0 else 0.9 if n % 8 == 0 and k % 8 == 0 else UNALIGNED
    )
    return tile * wave**0.5 * (k / (k + half_k)) * aligned


def _gemm_seconds(m: float, n: float, k: float, rate: float, bandwidth: float, sms: int) -> float:
    flops = 2.0 * m * n * k
    traffic = 2.0 * (m * k + k * n + m * n)
    half_k = HALF_K_PER_TFLOPS * rate / sms / 1e12
    return max(flops / (rate * gemm_efficiency(m, n, k, sms, half_k)), traffic / bandwidth)


def _linear(m: float, n: float, k: float, rate: float, bw: float, sms: int) -> tuple[float, float]:
    """Forward, and backward (input and weight gradients), of y[m,n] = x[m,k] w[k,n]."""
    forward = _gemm_seconds(m, n, k, rate, bw, sms)
    backward = _gemm_seconds(m, k, n, rate, bw, sms) + _gemm_seconds(k, n, m, rate, bw, sms)
    return forward, backward


@lru_cache(maxsize=65536)
def layer_time(
    spec: ArchSpec,
    device: Gpu,
    backend: Backend,
    tp: int,
    cp: int,
    ep: int,
    micro_batch: int,
    seq_len: int,
    dtype: str,
    flash: bool,
    sequence_parallel: bool,
) -> LayerTime:
    """Operator times of an average layer, the head and the embedding on one rank."""
    half = "fp16" if not device.supports("bf16") else "bf16"
    linear_dtype = dtype if device.supports(dtype) else half
    core_dtype = half if dtype == "fp8" else linear_dtype
    rate = device.matmul(linear_dtype) * 1e12 * device.sustained * backend.gemm
    core = device.matmul(core_dtype) * 1e12 * device.sustained
    bandwidth = device.memory_bandwidth * backend.memory_efficiency
    tokens = micro_batch * seq_len / cp
    h = spec.hidden
    forward = backward = 0.0
    q, kv = spec.q_size, spec.kv_size
    for n, k in (((q + 2 * kv) / tp, h), (h, q / tp)):
        f, b = _linear(tokens, n, k, rate, bandwidth, device.sms)
        forward, backward = forward + f, backward + b
    f, b = _mlp(spec, tokens, tp, ep, rate, bandwidth, device.sms)
    forward, backward = forward + f, backward + b
    head_rate = core * backend.gemm
    rows = vocab_rows(spec, tp) if backend.pads_vocab else spec.vocab / tp
    if rows % 8:
        head_rate *= UNALIGNED_HEAD.get(device.architecture, UNALIGNED) / UNALIGNED
    head = _linear(tokens, rows, h, head_rate, bandwidth, device.sms)
    logits = backend.logits_bytes * 3.0 * tokens * rows / bandwidth
    if flash:
        attention = _flash(spec, device, backend, tp, cp, micro_batch, seq_len)
    else:
        attention = _unfused(spec, core, bandwidth, tp, cp, micro_batch, seq_len)
    moved = _elementwise_bytes(spec, backend, tp, sequence_parallel) * tokens
    casts = _fp8_cast_bytes(spec, tp, tokens) if linear_dtype == "fp8" else 0.0
    return LayerTime(
        gemm_fwd=forward,
        gemm_bwd=backward,
        attention_fwd=attention[0],
        attention_bwd=attention[1],
        elementwise_fwd=(moved + casts) / bandwidth,
        elementwise_bwd=(2.0 * moved + casts) / bandwidth,
        head_fwd=head[0] + logits / 3,
        head_bwd=head[1] + 2 * logits / 3,
        embedding=3 * 2.0 * tokens * h / bandwidth,
        down_fwd=_linear(tokens, h, spec.ffn_hidden / tp, rate, bandwidth, device.sms)[0]
        if spec.moe is None
        else 0.0,
    )


def _mlp(
    spec: ArchSpec, tokens: float, tp: int, ep: int, rate: float, bandwidth: float, sms: int
) -> tuple[float, float]:
    h, gate = spec.hidden, spec.mlp_matrices - 1
    if spec.moe is None:
        up = _linear(tokens, gate * spec.ffn_hidden / tp, h, rate, bandwidth, sms)
        down = _linear(tokens, h, spec.ffn_hidden / tp, rate, bandwidth, sms)
        return up[0] + down[0], up[1] + down[1]
    moe = spec.moe
    local = moe.experts / ep
    rows = max(1.0, tokens * moe.active_experts / moe.experts * ep)
    up = _linear(rows, gate * moe.ffn_hidden / tp, h, rate, bandwidth, sms)
    down = _linear(rows, h, moe.ffn_hidden / tp, rate, bandwidth, sms)
    f, b = local * (up[0] + down[0]), local * (up[1] + down[1])
    if moe.shared_ffn_hidden:
        up = _linear(tokens, gate * moe.shared_ffn_hidden / tp, h, rate, bandwidth, sms)
        down = _linear(tokens, h, moe.shared_ffn_hidden / tp, rate, bandwidth, sms)
        f, b = f + up[0] + down[0], b + up[1] + down[1]
    dense_share = min(moe.first_dense_layers, spec.layers) / spec.layers
    if dense_share:
        up = _linear(tokens, gate * spec.ffn_hidden / tp, h, rate, bandwidth, sms)
        down = _linear(tokens, h, spec.ffn_hidden / tp, rate, bandwidth, sms)
        f = (1 - dense_share) * f + dense_share * (up[0] + down[0])
        b = (1 - dense_share) * b + dense_share * (up[1] + down[1])
    return f, b


def _score_flops(spec: ArchSpec, tp: int, cp: int, micro_batch: int, seq_len: int) -> float:
    """Scores and values of one layer, forward, whole square."""
    width = 2.0 * spec.q_size if spec.mla is None else _mla_width(spec)
    return 2.0 * micro_batch * seq_len * seq_len / cp * width / tp


def _flash(
    spec: ArchSpec,
    device: Gpu,
    backend: Backend,
    tp: int,
    cp: int,
    micro_batch: int,
    seq_len: int,
) -> tuple[float, float]:
    """Half the square (causal), at the kernel's measured rate; the backward does 2.5 x the work."""
    flops = _score_flops(spec, tp, cp, micro_batch, seq_len) / 2
    kernel = attention_rate(device, backend.attention)
    half = "bf16" if device.supports("bf16") else "fp16"
    scale = device.matmul(half) * device.sustained / kernel.matmul
    head = min(spec.head_dim, 128)
    scale *= head / (head + 12.0) * (140.0 / 128.0)
    # ring attention works on one rank's chunk of the sequence at a time
    scale *= seq_len / (seq_len + kernel.half_seq * cp)
    return flops / (kernel.fwd * scale * 1e12), 2.5 * flops / (kernel.bwd * scale * 1e12)


def _unfused(
    spec: ArchSpec, rate: float, bandwidth: float, tp: int, cp: int, micro_batch: int, seq_len: int
) -> tuple[float, float]:
    """The whole square in two batched GEMMs, plus the score tensor's trips to memory.

    Bytes per score, forward: write 2, scale+mask+softmax 4, dropout 5 (with its mask), of which the
    second GEMM reads 2; backward 19.
    Tensor cores need head dimensions that are multiples of 8 (bigscience, "NHEADs comparison").
    """
    flops = _score_flops(spec, tp, cp, micro_batch, seq_len)
    scores = micro_batch * spec.heads / tp * seq_len * seq_len / cp
    aligned = 0.5 if spec.head_dim % 8 == 0 else 0.1
    product = flops / (rate * aligned)
    return product + 11.0 * scores / bandwidth, 2 * product + 19.0 * scores / bandwidth


def _mla_width(spec: ArchSpec) -> float:
    mla = spec.mla
    assert mla is not None
    return float(spec.heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim + mla.v_head_dim))


def _elementwise_bytes(spec: ArchSpec, backend: Backend, tp: int, split_sequence: bool) -> float:
    """Bytes per token that a layer moves outside GEMM and attention, forward.

    Two norms and two residual additions on the hidden state (split only by sequence parallelism),
    rotary embedding of q and k, the activation, and the rows that go to experts and back.
    """
    norm = backend.layernorm_bytes if spec.norm == "layernorm" else backend.rmsnorm_bytes
    wide = 2.0 * (norm + backend.residual_bytes) * spec.hidden / (tp if split_sequence else 1)
    rope = backend.rope_bytes * (spec.q_size + spec.kv_size) if spec.position == "rope" else 0.0
    width = spec.ffn_hidden
    if spec.moe is not None:
        width = spec.moe.active_experts * spec.moe.ffn_hidden + spec.moe.shared_ffn_hidden
    gate = backend.gate_bytes if spec.mlp == "swiglu" else 4.0
    dispatch = 0.0
    if spec.moe is not None:
        share = 1.0 - min(spec.moe.first_dense_layers, spec.layers) / spec.layers
        dispatch = share * DISPATCH_BYTES * spec.moe.active_experts * spec.hidden
        dispatch /= tp if split_sequence else 1
    return wide + dispatch + (rope + gate * width) / tp


def _fp8_cast_bytes(spec: ArchSpec, tp: int, tokens: float) -> float:
    """Bytes that casting moves in one pass: every product's input (backward: output gradient) is
    read in bf16 and written twice in fp8, plain and transposed. Weights are cast once per step."""
    width = spec.ffn_hidden if spec.moe is None else spec.moe.active_experts * spec.moe.ffn_hidden
    return 4.0 * (2.0 * spec.hidden + (spec.q_size + width) / tp) * tokens


def layer_time_of(spec: ArchSpec, layout: Layout, device: Gpu, backend: Backend) -> LayerTime:
    """``layer_time`` with the fields of a layout."""
    return layer_time(
        spec,
        device,
        backend,
        layout.tp,
        layout.cp,
        layout.ep,
        layout.micro_batch,
        layout.seq_len,
        layout.dtype,
        layout.flash,
        layout.sequence_parallel,
    )
