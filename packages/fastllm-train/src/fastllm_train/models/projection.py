"""Linear layers, and how an input goes through several of them: by default one after another.

Tensor parallelism puts in their place what knows that they share their input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from fastllm_train.models.kernels import TORCH, Kernels

# (x [B, S, H], linear layers) → their outputs
Project = Callable[[Tensor, Sequence[nn.Module]], Sequence[Tensor]]


class Linear(nn.Linear):
    """``Kernels.linear`` with its weight and bias: [..., inputs] → [..., outputs]."""

    def __init__(self, inputs: int, outputs: int, bias: bool, kernels: Kernels = TORCH) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.kernels = kernels

    def forward(self, input: Tensor) -> Tensor:  # the name is torch's
        return self.kernels.linear(input, self.weight, self.bias)


def each(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor]:
    """``Project`` where nothing is cut."""
    return [layer(x) for layer in layers]
