"""``args`` of a Megatron checkpoint ↔ ``ArchSpec``.

Megatron's own converter writes wrong values here (rotary_base 10000 for every model, epsilon 1e-5,
no rope scaling: docs/convert.md), so a config.json beside the checkpoint, or ``--config``, wins.
What this package writes also carries the spec itself, as ``fastllm_arch``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fastllm_convert.dtypes import DType
from fastllm_convert.errors import UserError
from fastllm_convert.sharding import padded_vocab
from fastllm_planner.arch import (
    ArchError,
    ArchSpec,
    MoeSpec,
    RopeSpec,
    spec_from_dict,
    spec_to_dict,
)


def _int(args: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = args.get(key)
    if value is None:
        value = default
    if type(value) is not int or value < 1:
        raise UserError(
            f"the checkpoint's args have {key}={value!r}", hint="pass --config path/to/config.json"
        )
    return value


def _number(args: Mapping[str, Any], keys: tuple[str, ...], default: float) -> float:
    for key in keys:
        value = args.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            return float(value)
    return default


def spec_from_args(args: Mapping[str, Any], padded_rows: int) -> tuple[ArchSpec, list[str]]:
    """(spec, notes). ``padded_rows``: rows of the whole embedding, padding included."""
    carried: object = args.get("fastllm_arch")
    try:
        if isinstance(carried, dict):
            return spec_from_dict(cast("dict[str, Any]", carried)), []
        return _from_megatron(args, padded_rows)
    except ArchError as error:
        raise UserError(f"the checkpoint's args: {error}", error.hint) from None


def _from_megatron(args: Mapping[str, Any], padded_rows: int) -> tuple[ArchSpec, list[str]]:
    notes: list[str] = []
    vocab: Any = args.get("vocab_size")
    if type(vocab) is not int or not 0 < vocab <= padded_rows:
        vocab = padded_rows
        notes.append(
            f"the true vocabulary is not in the checkpoint: {vocab:,} rows kept, padding included "
            "(--vocab-size cuts it)"
        )
    heads, hidden = _int(args, "num_attention_heads"), _int(args, "hidden_size")
    kv_heads = heads
    if args.get("group_query_attention") or args.get("num_key_value_heads"):
        kv_heads = _int(args, "num_query_groups", args.get("num_key_value_heads") or heads)
    rms = str(args.get("normalization", "LayerNorm")).lower() == "rmsnorm"
    swiglu = bool(args.get("swiglu"))
    rope = bool(args.get("use_rotary_position_embeddings")) or (
        args.get("position_embedding_type") == "rope"
    )
    bias = bool(args.get("add_bias_linear", not rms))
    experts = args.get("num_experts")
    if isinstance(experts, list):  # Megatron-DeepSpeed: one number per MoE layer, [1] means none
        experts = None if experts == [1] else cast("list[Any]", experts)[0]
    moe = None
    ffn = _int(args, "ffn_hidden_size", 4 * hidden)
    if isinstance(experts, int) and experts > 1:
        moe = MoeSpec(experts, _int(args, "moe_router_topk", args.get("topk") or 2), ffn)
    window: Any = args.get("window_size")
    theta = _number(args, ("rotary_base", "rope_theta"), 10_000.0)
    qkv_bias = bias or bool(args.get("add_qkv_bias"))
    spec = ArchSpec(
        family=_family(args, rope=rope, qkv_bias=qkv_bias, bias=bias, moe=moe is not None),
        layers=_int(args, "num_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_int(args, "kv_channels", max(1, hidden // heads)),
        ffn_hidden=ffn,
        vocab=vocab,
        max_seq_len=_int(args, "max_position_embeddings", 2048),
        mlp="swiglu" if swiglu else "gelu",
        norm="rmsnorm" if rms else "layernorm",
        norm_eps=_number(args, ("norm_epsilon", "layernorm_epsilon"), 1e-5),
        position="rope" if rope else "learned",
        rope=_rope(args, theta),
        qkv_bias=qkv_bias,
        attention_out_bias=bias,
        mlp_bias=bias,
        qk_norm=bool(args.get("qk_layernorm")),
        tied_embeddings=not args.get("untie_embeddings_and_output_weights", False),
        sliding_window=window if type(window) is int else None,
        moe=moe,
    )
    notes.append(
        f"from the checkpoint's args: rope theta {theta:g}, epsilon {spec.norm_eps:g} "
        "(Megatron's own converter writes these wrong; --config overrides)"
    )
    return spec, notes


def _family(args: Mapping[str, Any], *, rope: bool, qkv_bias: bool, bias: bool, moe: bool) -> str:
    if not rope:
        return "gpt2"
    if moe:
        return "qwen3_moe" if args.get("qk_layernorm") else "mixtral"
    if args.get("qk_layernorm"):
        return "qwen3"
    if qkv_bias and not bias:
        return "qwen2"
    return "mistral" if args.get("window_size") is not None else "llama"


def _rope(args: Mapping[str, Any], theta: float) -> RopeSpec:
    """megatron-core's ``use_rope_scaling`` is LLaMA 3.1's rule with its constants."""
    if not args.get("use_rope_scaling"):
        return RopeSpec(theta)
    factor = _number(args, ("rope_scaling_factor",), 8.0)
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return RopeSpec(theta, tuple(scaling.items()))


def args_of(
    spec: ArchSpec,
    *,
    tp: int,
    pp: int,
    vp: int,
    ep: int = 1,
    vocab_multiple: int,
    dtype: DType,
    tokenizer: str,
    legacy: bool,
) -> dict[str, Any]:
    """The keys that Megatron's ``--use-checkpoint-args`` and ``check_checkpoint_args`` read."""
    rope = spec.position == "rope"
    scaling = spec.rope.scaling_dict
    moe = spec.moe
    ffn = spec.ffn_hidden if moe is None else moe.ffn_hidden
    return {
        "num_layers": spec.layers,
        "hidden_size": spec.hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": spec.heads,
        "group_query_attention": spec.kv_heads != spec.heads,
        "num_query_groups": spec.kv_heads,
        "num_key_value_heads": spec.kv_heads,
        "kv_channels": spec.head_dim,
        "max_position_embeddings": spec.max_seq_len,
        "seq_length": spec.max_seq_len,
        # megatron-core keeps its default here and has position_embedding_type decide.
        "add_position_embedding": not (rope and legacy),
        "position_embedding_type": "rope" if rope else "learned_absolute",
        "use_rotary_position_embeddings": rope and legacy,
        "rotary_base": int(spec.rope.theta) if spec.rope.theta.is_integer() else spec.rope.theta,
        "rope_theta": spec.rope.theta,
        "rotary_percent": 1.0,
        "use_rope_scaling": scaling.get("rope_type") == "llama3",
        "rope_scaling_factor": float(scaling.get("factor", 8.0)),
        "normalization": "RMSNorm" if spec.norm == "rmsnorm" else "LayerNorm",
        "norm_epsilon": spec.norm_eps,
        "layernorm_epsilon": spec.norm_eps,
        "swiglu": spec.mlp == "swiglu",
        "add_bias_linear": spec.mlp_bias,
        "disable_bias_linear": not spec.mlp_bias,
        "add_qkv_bias": spec.qkv_bias,
        "qk_layernorm": spec.qk_norm,
        "window_size": spec.sliding_window,
        "untie_embeddings_and_output_weights": not spec.tied_embeddings,
        "num_experts": moe.experts if moe else None,
        "moe_router_topk": moe.active_experts if moe else 2,
        "vocab_size": spec.vocab,
        "padded_vocab_size": padded_vocab(spec.vocab, vocab_multiple, tp),
        "make_vocab_size_divisible_by": vocab_multiple,
        "tokenizer_type": tokenizer,
        "tokenizer_model": None,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vp if vp > 1 else None,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": tp,
        "params_dtype": dtype,
        "bf16": dtype.code == "BF16",
        "fp16": dtype.code == "F16",
        "iteration": 1,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "fastllm_arch": spec_to_dict(spec),
    }
