"""Definition of torch operators over kernels of fastllm_core, which knows tensors by DLPack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch  # before fastllm_core: both then share torch's OpenMP threads and their number
from torch.utils import dlpack

__all__ = ["capsule", "contiguous_capsule", "define", "stream_of", "with_autograd"]

# The function behind torch.Tensor.__dlpack__, without its 5 microseconds of Python.
_to_dlpack: Callable[[torch.Tensor], object] = vars(dlpack)["to_dlpack"]
_library = torch.library.Library("fastllm", "FRAGMENT")


def define(schema: str, kernel: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Defines ``fastllm::<schema>`` with one kernel for CPU and CUDA tensors; returns the operator.

    ``fake`` makes the outputs' metadata only. Outputs must be fresh and contiguous.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _library.impl(name, kernel, device)
    torch.library.register_fake(f"fastllm::{name}", fake, lib=_library)
    return getattr(torch.ops.fastllm, name).default


def with_autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None]
) -> None:
    """Registers ``backward`` for ``fastllm::<name>``."""
    torch.library.register_autograd(
        f"fastllm::{name}", backward, setup_context=setup_context, lib=_library
    )


def capsule(tensor: torch.Tensor) -> object:
    """A DLPack capsule of the tensor, with its strides."""
    return _to_dlpack(tensor)


def contiguous_capsule(tensor: torch.Tensor) -> object:
    """A DLPack capsule of the tensor, copied first if it is not contiguous."""
    return _to_dlpack(tensor.contiguous())


def stream_of(tensor: torch.Tensor) -> int:
    """The address of the current CUDA stream of the tensor's device; 0 for a CPU tensor."""
    if not tensor.is_cuda:
        return 0
    return torch.cuda.current_stream(tensor.device).cuda_stream
