"""Qwen2 and Qwen2.5 (arXiv:2407.10671, 2412.15115), Hugging Face ``qwen2``: biases on q, k, v."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastllm_planner.arch.hf_fields import (
    decoder_fields,
    decoder_to_hf,
    read_window,
    write_window,
)
from fastllm_planner.arch.spec import ArchSpec

FAMILY = "qwen2"
MODEL_TYPES = ("qwen2",)


def from_hf(config: Mapping[str, Any]) -> ArchSpec:
    """``config.json`` of a ``Qwen2ForCausalLM`` → spec."""
    fields = decoder_fields(config, norm_eps=1e-6, vocab=151_936, max_seq_len=32_768, kv_heads=32)
    return ArchSpec(family=FAMILY, **fields, qkv_bias=True, **read_window(config, fields["layers"]))


def to_hf(spec: ArchSpec) -> dict[str, Any]:
    """Spec → the keys of a ``Qwen2ForCausalLM`` config."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **decoder_to_hf(spec),
        **write_window(spec),
    }
