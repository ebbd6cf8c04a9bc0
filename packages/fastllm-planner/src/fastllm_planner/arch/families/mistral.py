"""Mistral 7B (arXiv:2310.06825) and Hugging Face ``mistral``: LLaMA with a sliding window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastllm_planner.arch.hf_fields import decoder_fields, decoder_to_hf, read_int
from fastllm_planner.arch.spec import ArchSpec

FAMILY = "mistral"
MODEL_TYPES = ("mistral",)


def from_hf(config: Mapping[str, Any]) -> ArchSpec:
    """``config.json`` of a ``MistralForCausalLM`` → spec; a missing window is 4096, null none."""
    window = config.get("sliding_window", 4096)
    return ArchSpec(
        family=FAMILY,
        **decoder_fields(config, norm_eps=1e-6, vocab=32_000, max_seq_len=131_072, kv_heads=8),
        sliding_window=None if window is None else read_int(config, "sliding_window", 4096),
    )


def to_hf(spec: ArchSpec) -> dict[str, Any]:
    """Spec → the keys of a ``MistralForCausalLM`` config."""
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        **decoder_to_hf(spec),
        "sliding_window": spec.sliding_window,
    }
