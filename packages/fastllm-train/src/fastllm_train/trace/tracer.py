"""Bytes of live storages, by category, and their peak.

Counts what the dispatcher makes, so it works on real and on fake tensors of any device, with any
code. What it does not see is how a caching allocator rounds and fragments.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

ROUND_TO = 512  # bytes: the granularity of torch's CUDA allocator


@dataclass
class Peak:
    """The fullest moment: bytes in all, by category, and the phase it fell in."""

    total: int = 0
    phase: str = ""
    by_category: dict[str, int] = field(default_factory=dict)


class MemoryTracer(TorchDispatchMode):
    """While entered, storages that operators make count under the ``phase`` of that moment, until
    they are freed; ``track`` names those of given tensors."""

    def __init__(self, phase: str = "set-up") -> None:
        super().__init__()
        self.phase = phase
        self.peak = Peak()
        self.live: Counter[str] = Counter()
        self._current = 0
        self._seen: dict[int, tuple[Any, int, str]] = {}

    @property
    def current(self) -> int:
        return self._current

    def track(self, tensors: Iterable[torch.Tensor], category: str) -> None:
        """Count these tensors' storages under ``category``, whenever they were made."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            known = self._seen.pop(storage._cdata, None)
            if known is not None:
                self._change(known[2], -known[1])
            self._add(storage, category)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            # (A fake tensor says the device it stands for; a meta tensor has no memory.)
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                # Sparse and some wrapped tensors have no storage of their own.
                with suppress(NotImplementedError, RuntimeError):
                    self._add(leaf.untyped_storage(), self.phase)
        return out

    def _add(self, storage: torch.UntypedStorage, category: str) -> None:
        key = storage._cdata
        known = self._seen.get(key)
        if known is not None and known[0]() is not None:
            return
        size = -(-storage.nbytes() // ROUND_TO) * ROUND_TO

        def freed(_: object) -> None:
            found = self._seen.pop(key, None)
            if found is not None:
                self._change(found[2], -found[1])

        self._seen[key] = (weakref.ref(storage, freed), size, category)
        self._change(category, size)

    def _change(self, category: str, size: int) -> None:
        self._current += size
        self.live[category] += size
        if self._current > self.peak.total:
            held = {name: count for name, count in self.live.items() if count}
            self.peak = Peak(self._current, self.phase, held)
