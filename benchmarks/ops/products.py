"""The matrix products of a transformer layer: fastllm's fused ones and torch's separate steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastllm_train.ops.grouped_linear import grouped_linear
from fastllm_train.ops.linear_bias import linear_bias
from fastllm_train.ops.linear_bias_gelu import linear_bias_gelu
from fastllm_train.ops.linear_swiglu import linear_swiglu
from fastllm_train.ops.linear_weight_grad import linear_weight_grad_


@dataclass
class Product:
    name: str
    operator_name: str
    flops: int
    operator: Callable[[], object]
    torch: Callable[[], object]


def products(tokens: int, hidden: int) -> list[Product]:
    """In bfloat16, of ``tokens`` rows and ``hidden`` columns on torch's default device."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).bfloat16() * shape[-1] ** -0.5

    wide = 4 * hidden
    x, w, gate, up = (
        random(tokens, hidden),
        random(wide, hidden),
        random(wide, hidden),
        random(wide, hidden),
    )
    bias, dy = random(wide), random(tokens, wide)
    main_grad = torch.zeros(wide, hidden)
    experts = 8
    stacked = random(experts, hidden, hidden)
    offsets = torch.arange(experts + 1) * (tokens // experts)
    rows = int(offsets[-1])
    flops = 2 * tokens * hidden * wide

    def grouped_eager() -> object:
        return torch.cat([a @ b.t() for a, b in zip(x[:rows].chunk(experts), stacked, strict=True)])

    def weight_grad_eager() -> object:
        return main_grad.add_(dy.t() @ x)

    return [
        Product(
            "linear_bias bf16", "linear_bias", flops,
            lambda: linear_bias(x, w, bias), lambda: F.linear(x, w, bias),
        ),
        Product(
            "linear_bias_gelu bf16", "linear_bias_gelu", flops,
            lambda: linear_bias_gelu(x, w, bias),
            lambda: F.gelu(F.linear(x, w, bias), approximate="tanh"),
        ),
        Product(
            "linear_swiglu bf16", "linear_swiglu", 2 * flops,
            lambda: linear_swiglu(x, gate, up),
            lambda: F.silu(F.linear(x, gate)) * F.linear(x, up),
        ),
        Product(
            "linear_weight_grad bf16", "linear_weight_grad", flops,
            lambda: linear_weight_grad_(main_grad, dy, x), weight_grad_eager,
        ),
        Product(
            f"grouped_linear bf16, {experts} experts", "grouped_linear", 2 * rows * hidden * hidden,
            lambda: grouped_linear(x[:rows], stacked, offsets), grouped_eager,
        ),
    ]  # fmt: skip
