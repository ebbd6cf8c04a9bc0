"""Mixtral 8x7B and 8x22B (arXiv:2401.04088), Hugging Face ``mixtral``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastllm_planner.arch.hf_fields import (
    decoder_fields,
    decoder_to_hf,
    read_int,
    read_number,
)
from fastllm_planner.arch.spec import ArchError, ArchSpec, MoeSpec

FAMILY = "mixtral"
MODEL_TYPES = ("mixtral",)


def from_hf(config: Mapping[str, Any]) -> ArchSpec:
    """``config.json`` of a ``MixtralForCausalLM`` → spec. ``intermediate_size`` is one expert's."""
    fields = decoder_fields(
        config, norm_eps=1e-5, vocab=32_000, max_seq_len=131_072, kv_heads=8, theta=1e6
    )
    window = config.get("sliding_window")
    return ArchSpec(
        family=FAMILY,
        **fields,
        sliding_window=None if window is None else read_int(config, "sliding_window", 4096),
        moe=MoeSpec(
            experts=read_int(config, "num_local_experts", 8),
            active_experts=read_int(config, "num_experts_per_tok", 2),
            ffn_hidden=fields["ffn_hidden"],
            aux_loss_coef=read_number(config, "router_aux_loss_coef", 0.001),
        ),
    )


def to_hf(spec: ArchSpec) -> dict[str, Any]:
    """Spec → the keys of a ``MixtralForCausalLM`` config."""
    moe = spec.moe
    if moe is None:
        raise ArchError("family 'mixtral' needs experts")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **decoder_to_hf(spec),
        "intermediate_size": moe.ffn_hidden,
        "sliding_window": spec.sliding_window,
        "num_local_experts": moe.experts,
        "num_experts_per_tok": moe.active_experts,
        "router_aux_loss_coef": moe.aux_loss_coef,
        "output_router_logits": False,
    }
