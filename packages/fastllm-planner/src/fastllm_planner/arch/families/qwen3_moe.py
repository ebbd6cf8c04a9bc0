"""Qwen3 mixture of experts (arXiv:2505.09388), Hugging Face ``qwen3_moe``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fastllm_planner.arch.hf_fields import (
    decoder_fields,
    decoder_to_hf,
    expect,
    read_flag,
    read_number,
    require_int,
)
from fastllm_planner.arch.spec import ArchError, ArchSpec, MoeSpec

FAMILY = "qwen3_moe"
MODEL_TYPES = ("qwen3_moe",)


def from_hf(config: Mapping[str, Any]) -> ArchSpec:
    """``config.json`` of a ``Qwen3MoeForCausalLM`` → spec. Experts sit in every layer."""
    expect(config, "decoder_sparse_step", 1)
    # transformers 5 writes num_local_experts, the published files num_experts.
    experts = "num_local_experts" if "num_experts" not in config else "num_experts"
    bias = read_flag(config, "attention_bias", False)
    window = None
    if read_flag(config, "use_sliding_window", False) and config.get("sliding_window"):
        window = require_int(config, "sliding_window")
    fields = decoder_fields(config, norm_eps=1e-6, vocab=151_936, max_seq_len=32_768, kv_heads=4)
    return ArchSpec(
        family=FAMILY,
        **fields,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm=True,
        sliding_window=window,
        moe=MoeSpec(
            experts=require_int(config, experts),
            active_experts=require_int(config, "num_experts_per_tok"),
            ffn_hidden=require_int(config, "moe_intermediate_size"),
            first_dense_layers=_dense_layers(config),
            norm_topk=read_flag(config, "norm_topk_prob", False),
            aux_loss_coef=read_number(config, "router_aux_loss_coef", 0.001),
        ),
    )


def _dense_layers(config: Mapping[str, Any]) -> int:
    """``mlp_only_layers`` must be the first ones: that is what ``MoeSpec`` can say."""
    listed = config.get("mlp_only_layers")
    if listed is None:
        return 0
    if isinstance(listed, list):
        layers = cast("list[object]", listed)
        if layers == list(range(len(layers))):
            return len(layers)
    raise ArchError(f"config.json: mlp_only_layers={listed!r} is not the first layers")


def to_hf(spec: ArchSpec) -> dict[str, Any]:
    """Spec → the keys of a ``Qwen3MoeForCausalLM`` config, experts in both spellings."""
    moe = spec.moe
    if moe is None:
        raise ArchError("family 'qwen3_moe' needs experts")
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **decoder_to_hf(spec),
        "attention_bias": spec.qkv_bias,
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(moe.first_dense_layers)),
        "num_experts": moe.experts,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.active_experts,
        "moe_intermediate_size": moe.ffn_hidden,
        "norm_topk_prob": moe.norm_topk,
        "router_aux_loss_coef": moe.aux_loss_coef,
        "output_router_logits": False,
    }
