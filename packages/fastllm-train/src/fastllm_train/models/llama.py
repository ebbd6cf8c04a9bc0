"""LLaMA 1/2/3/3.1/3.2: pre-norm decoder, RMSNorm, rotary positions, grouped queries, SwiGLU.

Touvron et al. 2023 (arXiv:2302.13971, arXiv:2307.09288), Dubey et al. 2024 (arXiv:2407.21783).
"""

from __future__ import annotations

from fastllm_planner.arch import ArchSpec
from fastllm_train.errors import UserError

FAMILY = "llama"


def check(spec: ArchSpec) -> None:
    """``UserError`` for a spec that is no LLaMA."""
    fits = (
        spec.norm == "rmsnorm"
        and spec.mlp == "swiglu"
        and spec.position == "rope"
        and not (spec.qk_norm or spec.norm_head or spec.moe or spec.mla or spec.sliding_window)
    )
    if not fits:
        raise UserError("this architecture says family 'llama' but is not one")
