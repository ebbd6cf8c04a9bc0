"""LLaMA 1/2/3/3.1/3.2 (arXiv:2302.13971, 2307.09288, 2407.21783) and Hugging Face ``llama``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastllm_planner.arch.hf_fields import decoder_fields, decoder_to_hf, read_flag
from fastllm_planner.arch.spec import ArchSpec

FAMILY = "llama"
MODEL_TYPES = ("llama",)


def from_hf(config: Mapping[str, Any]) -> ArchSpec:
    """``config.json`` of a ``LlamaForCausalLM`` → spec. ``attention_bias`` biases q, k, v and o."""
    bias = read_flag(config, "attention_bias", False)
    return ArchSpec(
        family=FAMILY,
        **decoder_fields(config, norm_eps=1e-6, vocab=32_000, max_seq_len=2048),
        qkv_bias=bias,
        attention_out_bias=bias,
        mlp_bias=read_flag(config, "mlp_bias", False),
    )


def to_hf(spec: ArchSpec) -> dict[str, Any]:
    """Spec → the keys of a ``LlamaForCausalLM`` config."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **decoder_to_hf(spec),
        "attention_bias": spec.qkv_bias,
        "mlp_bias": spec.mlp_bias,
    }
