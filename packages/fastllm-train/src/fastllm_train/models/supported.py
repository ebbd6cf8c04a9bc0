"""Which architectures the trainer has a model for. Imports no framework: ``check`` reads it."""

from __future__ import annotations

from collections.abc import Callable

from fastllm_planner.arch import ArchSpec
from fastllm_train.errors import UserError
from fastllm_train.models import llama

FAMILIES: dict[str, Callable[[ArchSpec], None]] = {llama.FAMILY: llama.check}
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
    family = FAMILIES.get(spec.family)
    if family is None:
        raise UserError(
            f"model family {spec.family!r} cannot be trained yet",
            hint=f"trainable families: {', '.join(sorted(FAMILIES))}",
        )
    family(spec)
    if spec.position == "rope":
        _check_rope(spec)


def _check_rope(spec: ArchSpec) -> None:
    scaling = spec.rope.scaling_dict
    kind = scaling.get("rope_type", "default")
    if kind not in ROPE_SCALINGS:
        raise UserError(
            f"rope_type {kind!r} cannot be trained yet",
            hint=f"trainable: {', '.join(ROPE_SCALINGS)}",
        )
    for key in ROPE_SCALINGS[kind]:
        if not isinstance(scaling.get(key), int | float) or scaling[key] <= 0:
            raise UserError(f"rope scaling {kind!r} needs a positive {key!r}")
