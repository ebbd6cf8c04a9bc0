"""Qwen3 dense (arXiv:2505.09388), Hugging Face ``qwen3``: RMSNorm on q and k, no biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastllm_planner.arch.hf_fields import (
    decoder_fields,
    decoder_to_hf,
    read_flag,
    read_window,
    write_window,
)
from fastllm_planner.arch.spec import ArchSpec

FAMILY = "qwen3"
MODEL_TYPES = ("qwen3",)


def from_hf(config: Mapping[str, Any]) -> ArchSpec:
    """``config.json`` of a ``Qwen3ForCausalLM`` → spec. Heads are 128 wide unless it says else."""
    fields = decoder_fields(
        config, norm_eps=1e-6, vocab=151_936, max_seq_len=32_768, kv_heads=32, head_dim=128
    )
    bias = read_flag(config, "attention_bias", False)
    return ArchSpec(
        family=FAMILY,
        **fields,
        qkv_bias=bias,
        attention_out_bias=bias,
        qk_norm=True,
        **read_window(config, fields["layers"]),
    )


def to_hf(spec: ArchSpec) -> dict[str, Any]:
    """Spec → the keys of a ``Qwen3ForCausalLM`` config."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **decoder_to_hf(spec),
        "attention_bias": spec.qkv_bias,
        **write_window(spec),
    }
