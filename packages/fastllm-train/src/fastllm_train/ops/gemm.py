"""Where matrix products run: in the CUTLASS kernels of fastllm_core, or in torch's own.

The kernels are there when the core was built with ``-DFASTLLM_CUTLASS=ON``, and take bfloat16 and
float16 on a CUDA device with sizes that are multiples of 8 (``cpp/include/fastllm/gemm.hpp``).
Everything else, every CPU tensor among it, goes through torch's matmul, so that the same model code
runs anywhere.
"""

from __future__ import annotations

from typing import Any

import torch

from fastllm_core import _core

__all__ = ["kernels", "require_linear", "takes"]

# The extension; its products are missing from a build without CUTLASS.
kernels: Any = _core
_BUILT = hasattr(_core, "linear_bias")


def takes(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernels take a product of x (rows, k) with weight (..., n, k)."""
    return (
        _BUILT
        and x.is_cuda
        and x.dtype in (torch.bfloat16, torch.float16)
        and weight.shape[-1] % 8 == 0
        and weight.shape[-2] % 8 == 0
        and x.data_ptr() % 16 == 0
        and weight.data_ptr() % 16 == 0
    )


def require_linear(op: str, x: torch.Tensor, name: str, weight: torch.Tensor) -> None:
    """Raises ValueError unless x (..., k) and weight (n, k) can be multiplied."""
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and {name} {tuple(weight.shape)},"
            " expected (..., k) and (n, k)"
        )
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"{op}: {name} is {weight.dtype} on {weight.device}, expected {x.dtype} on {x.device}"
        )
