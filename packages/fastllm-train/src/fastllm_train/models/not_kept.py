"""Activations that are made again in the backward pass instead of being kept for it.

For results of element-wise work that a matrix product reads: a norm's output, a gated unit. Making
them again costs a pass over memory, keeping them costs their size in every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Again:
    """``make()``'s result, held from the first use of it to the last in a backward pass."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self.uses = 0
        self._left = 0
        self._made: Tensor | None = None

    def take(self) -> Tensor:
        if self._made is None:
            with torch.no_grad():
                self._made = self._make()
            self._left = self.uses
        made = self._made
        self._left -= 1
        if self._left == 0:
            self._made = None
        return made


class _View(NamedTuple):
    """What was kept of a tensor: where it lies in the one that is made again."""

    again: _Again
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@contextmanager
def not_kept(x: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """While entered, autograd does not keep ``x``, or views of it, for the backward pass: there
    ``make()`` gives the same values in the same layout, once for all that read them."""
    storage = x.untyped_storage()._cdata
    again = _Again(make)

    def pack(tensor: Tensor) -> Any:
        if tensor.untyped_storage()._cdata != storage:
            return tensor
        again.uses += 1
        return _View(again, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(packed: Any) -> Tensor:
        if not isinstance(packed, _View):
            return packed
        return packed.again.take().as_strided(packed.size, packed.stride, packed.offset)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
