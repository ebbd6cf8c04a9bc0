"""How an input goes through several linear layers: by default one after another.

Tensor parallelism puts in its place what knows that they share their input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

# (x [B, S, H], linear layers) → their outputs
Project = Callable[[Tensor, Sequence[nn.Module]], Sequence[Tensor]]


def each(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """``Project`` where nothing is cut."""
    return [layer(x) for layer in layers]
