"""Which architectures the trainer has a model for. Imports no framework: ``check`` reads it.

One decoder serves every family: ``ArchSpec`` says which parts it is made of. A family is listed
here once its logits and gradients have been held against a reference (tests/train/test_models.py).
"""

from __future__ import annotations

from fastllm_planner.arch import ArchSpec
from fastllm_train.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "baichuan", "mixtral", "qwen3_moe")
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}


def check_supported(spec: ArchSpec) -> None:
    """``UserError`` when the trainer has no model for ``spec``."""
    if spec.family not in FAMILIES:
        raise UserError(
            f"model family {spec.family!r} cannot be trained yet",
            hint=f"trainable families: {', '.join(FAMILIES)}",
        )
    if spec.mla is not None:
        raise UserError("multi-head latent attention cannot be trained yet")
    _check_experts(spec)
    if spec.position == "rope":
        _check_rope(spec)
    if spec.position == "alibi" and spec.sliding_window is not None:
        raise UserError("ALiBi with a sliding window cannot be trained")
    if spec.norm_head and spec.tied_embeddings:
        raise UserError("a normalised head cannot share the embedding's weights")


def _check_experts(spec: ArchSpec) -> None:
    moe = spec.moe
    if moe is None:
        return
    plain = moe.scoring == "softmax" and moe.groups == 1 and moe.routed_scaling == 1.0
    if not plain or moe.router_bias or moe.shared_ffn_hidden or spec.mlp != "swiglu":
        raise UserError(
            "this mixture of experts cannot be trained yet",
            hint="trainable: softmax routing to SwiGLU experts, no groups, no shared experts",
        )


def _check_rope(spec: ArchSpec) -> None:
    scaling = spec.rope.scaling_dict
    kind = scaling.get("rope_type", "default")
    if kind not in ROPE_SCALINGS:
        raise UserError(
            f"rope_type {kind!r} cannot be trained yet",
            hint=f"trainable: {', '.join(ROPE_SCALINGS)}",
        )
    for key in ROPE_SCALINGS[kind]:
        value = scaling.get(key)
        if not isinstance(value, int | float) or value <= 0:
            raise UserError(f"rope scaling {kind!r} needs a positive {key!r}")
