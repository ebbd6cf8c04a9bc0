"""Every tensor of a model: name, shape, role, tensor-parallel axis, pipeline position.

Canonical names follow Hugging Face's LLaMA for every family (GPT-2 included), with separate
q/k/v and one tensor per expert; each checkpoint format maps onto them. Linear weights are
``[out, in]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from fastllm_planner.arch.spec import ArchSpec

Role = Literal[
    "embedding",
    "position_embedding",
    "norm",
    "attention_q",
    "attention_k",
    "attention_v",
    "attention_out",
    "mlp_gate",
    "mlp_up",
    "mlp_down",
    "router",
    "head",
]
Stage = Literal["embedding", "layer", "final_norm", "head"]


@dataclass(frozen=True)
class ParamSpec:
    """One tensor.

    ``tp_axis``: dimension that tensor parallelism splits (0 column/vocabulary, 1 row), or None when
    every rank holds a copy. ``stage`` and ``layer``: position in the pipeline (``layer`` is None
    outside the layers). ``expert``: index of the owning expert, or None. ``tied_to``: name of the
    tensor whose storage this one shares; tied tensors are listed but hold no elements of their own.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    tp_axis: int | None
    stage: Stage
    layer: int | None = None
    expert: int | None = None
    tied_to: str | None = None

    @property
    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


EMBEDDING = "model.embed_tokens.weight"
POSITIONS = "model.embed_positions.weight"
FINAL_NORM = "model.norm"
HEAD = "lm_head.weight"


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def iter_params(spec: ArchSpec) -> Iterator[ParamSpec]:
    """Yield every tensor in pipeline order: embeddings, layers, final norm, head."""
    yield ParamSpec(EMBEDDING, (spec.vocab, spec.hidden), "embedding", 0, "embedding")
    if spec.position == "learned":
        shape = (spec.max_seq_len, spec.hidden)
        yield ParamSpec(POSITIONS, shape, "position_embedding", None, "embedding")
    for layer in range(spec.layers):
        yield from iter_layer_params(spec, layer)
    yield from _norm(spec, FINAL_NORM, spec.hidden, "final_norm", None)
    tied = EMBEDDING if spec.tied_embeddings else None
    yield ParamSpec(HEAD, (spec.vocab, spec.hidden), "head", 0, "head", tied_to=tied)


def iter_layer_params(spec: ArchSpec, layer: int) -> Iterator[ParamSpec]:
    """The tensors of one transformer layer, in forward order."""
    prefix = layer_prefix(layer)
    yield from _norm(spec, prefix + "input_layernorm", spec.hidden, "layer", layer)
    yield from _mla(spec, layer) if spec.mla else _attention(spec, layer)
    yield from _norm(spec, prefix + "post_attention_layernorm", spec.hidden, "layer", layer)
    if spec.is_moe_layer(layer):
        yield from _moe(spec, layer)
    else:
        yield from _mlp(spec, layer, prefix + "mlp.", spec.ffn_hidden, expert=None)


def count_params(spec: ArchSpec) -> int:
    """Parameters, to the unit; a tied head counts once."""
    return sum(p.numel for p in iter_params(spec) if p.tied_to is None)


def count_active_params(spec: ArchSpec) -> int:
    """Parameters that one token passes through: ``active_experts`` of ``experts`` per MoE layer."""
    if spec.moe is None:
        return count_params(spec)
    active = spec.moe.active_experts
    kept = (p for p in iter_params(spec) if p.tied_to is None)
    return sum(p.numel for p in kept if p.expert is None or p.expert < active)


def _norm(
    spec: ArchSpec, name: str, width: int, stage: Stage, layer: int | None
) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{name}.weight", (width,), "norm", None, stage, layer)
    if spec.norm == "layernorm":
        yield ParamSpec(f"{name}.bias", (width,), "norm", None, stage, layer)


def _linear(
    name: str,
    shape: tuple[int, int],
    role: Role,
    tp_axis: int | None,
    layer: int,
    *,
    bias: bool = False,
    expert: int | None = None,
) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{name}.weight", shape, role, tp_axis, "layer", layer, expert)
    if bias:
        # A column-parallel bias is split with its rows; a row-parallel one is added after the sum.
        bias_axis = 0 if tp_axis == 0 else None
        yield ParamSpec(f"{name}.bias", shape[:1], role, bias_axis, "layer", layer, expert)


def _attention(spec: ArchSpec, layer: int) -> Iterator[ParamSpec]:
    prefix = layer_prefix(layer) + "self_attn."
    h, bias = spec.hidden, spec.qkv_bias
    yield from _linear(prefix + "q_proj", (spec.q_size, h), "attention_q", 0, layer, bias=bias)
    yield from _linear(prefix + "k_proj", (spec.kv_size, h), "attention_k", 0, layer, bias=bias)
    yield from _linear(prefix + "v_proj", (spec.kv_size, h), "attention_v", 0, layer, bias=bias)
    if spec.qk_norm:
        yield from _norm(spec, prefix + "q_norm", spec.head_dim, "layer", layer)
        yield from _norm(spec, prefix + "k_norm", spec.head_dim, "layer", layer)
    shape = (h, spec.q_size)
    out_bias = spec.attention_out_bias
    yield from _linear(prefix + "o_proj", shape, "attention_out", 1, layer, bias=out_bias)


def _mla(spec: ArchSpec, layer: int) -> Iterator[ParamSpec]:
    mla = spec.mla
    assert mla is not None
    prefix = layer_prefix(layer) + "self_attn."
    q_out = spec.heads * (mla.qk_nope_head_dim + mla.qk_rope_head_dim)
    if mla.q_lora_rank:
        shape = (mla.q_lora_rank, spec.hidden)
        yield from _linear(prefix + "q_a_proj", shape, "attention_q", None, layer)
        yield from _norm(spec, prefix + "q_a_layernorm", mla.q_lora_rank, "layer", layer)
        q_shape = (q_out, mla.q_lora_rank)
        yield from _linear(prefix + "q_b_proj", q_shape, "attention_q", 0, layer)
    else:
        yield from _linear(prefix + "q_proj", (q_out, spec.hidden), "attention_q", 0, layer)
    latent = (mla.kv_lora_rank + mla.qk_rope_head_dim, spec.hidden)
    yield from _linear(prefix + "kv_a_proj_with_mqa", latent, "attention_k", None, layer)
    yield from _norm(spec, prefix + "kv_a_layernorm", mla.kv_lora_rank, "layer", layer)
    expand = (spec.heads * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    yield from _linear(prefix + "kv_b_proj", expand, "attention_v", 0, layer)
    out = (spec.hidden, spec.heads * mla.v_head_dim)
    yield from _linear(prefix + "o_proj", out, "attention_out", 1, layer)


def _mlp(
    spec: ArchSpec, layer: int, prefix: str, width: int, *, expert: int | None
) -> Iterator[ParamSpec]:
    h, bias = spec.hidden, spec.mlp_bias
    if spec.mlp == "swiglu":
        name = prefix + "gate_proj"
        yield from _linear(name, (width, h), "mlp_gate", 0, layer, bias=bias, expert=expert)
    name = prefix + "up_proj"
    yield from _linear(name, (width, h), "mlp_up", 0, layer, bias=bias, expert=expert)
    name = prefix + "down_proj"
    yield from _linear(name, (h, width), "mlp_down", 1, layer, bias=bias, expert=expert)


def _moe(spec: ArchSpec, layer: int) -> Iterator[ParamSpec]:
    moe = spec.moe
    assert moe is not None
    prefix = layer_prefix(layer) + "mlp."
    yield from _linear(prefix + "router", (moe.experts, spec.hidden), "router", None, layer)
    if moe.router_bias:
        name = prefix + "router.correction_bias"
        yield ParamSpec(name, (moe.experts,), "router", None, "layer", layer)
    for expert in range(moe.experts):
        expert_prefix = f"{prefix}experts.{expert}."
        yield from _mlp(spec, layer, expert_prefix, moe.ffn_hidden, expert=expert)
    if moe.shared_ffn_hidden:
        shared = prefix + "shared_experts."
        yield from _mlp(spec, layer, shared, moe.shared_ffn_hidden, expert=None)
