"""Memory that an operator writes and reads and nobody after it.

On a CPU fresh memory costs page faults, and large blocks that come and go leave holes between those
that stay. So operators take their temporary tensors from one block per thread, which stays.
"""

from __future__ import annotations

import math
import threading

import torch

from fastllm_train.ops.registration import runs_directly

__all__ = ["scratch"]

_LINE = 64  # bytes of the processor's cache; tensors begin at multiples


class _Kept(threading.local):
    block: torch.Tensor | None = None


_kept = _Kept()


def scratch(like: torch.Tensor, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Tensors of these shapes, of ``like``'s dtype, with any values.

    They are the caller's until it returns, so it may not call another operator that takes some. On
    a GPU, and where something follows what is allocated, they are ordinary tensors.
    """
    if not like.is_cpu or not runs_directly((like,)):
        return [like.new_empty(shape) for shape in shapes]
    sizes = [-(-math.prod(s) * like.element_size() // _LINE) * _LINE for s in shapes]
    if _kept.block is None or _kept.block.numel() < sum(sizes):
        _kept.block = None  # first given back, then taken
        _kept.block = torch.empty(sum(sizes), dtype=torch.uint8)
    parts = _kept.block[: sum(sizes)].split(sizes)
    return [
        part.view(like.dtype)[: math.prod(shape)].view(shape)
        for part, shape in zip(parts, shapes, strict=True)
    ]
