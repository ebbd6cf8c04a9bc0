"""How the same arithmetic is run ([speed])."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SpeedConfig:
    """``kernels``: "fused" runs norms, rotary embedding, gated units and cross entropy through the
    native core; "torch" operation by operation, the reference that the tests compare with."""

    kernels: Literal["fused", "torch"] = "fused"
