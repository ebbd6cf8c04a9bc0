"""Random shapes, dtypes and values for an operator, and the CPU backend that runs them.

A test under ``random_cases`` takes ``case``: up to 70 rows, up to 16,384 columns of any parity, a
dtype, and one of VALUES. The same few cases run each time, none of them both tall and wide;
``pytest tests/ops -k random_shapes --hypothesis-profile=thorough`` takes a thousand others per
operator, up to 70 x 16,384.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm_core import _core

from .accuracy import DTYPES

# normal; of size 1e-4; of size 1e4; +-1e4 among normal ones
VALUES = ("normal", "small", "large", "extreme")


class CpuBackend:
    """The CPU at its best vector level: a backend without a fixture, for hypothesis."""

    name = "cpu"
    core: Any = _core
    cuda = False

    def put(self, tensor: torch.Tensor, offset: int = 0) -> torch.Tensor:
        assert offset == 0
        return tensor.clone()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
        assert offset == 0
        garbage = float("nan") if dtype.is_floating_point else -1
        return torch.full(shape, garbage, dtype=dtype)

    def get(self, array: torch.Tensor) -> torch.Tensor:
        return array

    def finish(self) -> None:
        pass


CPU = CpuBackend()


@dataclass(frozen=True)
class RandomCase:
    rows: int
    cols: int
    dtype: torch.dtype
    values: str
    flag: bool  # whether the optional arguments are given
    seed: int

    def tensor(self, *shape: int, index: int = 0) -> torch.Tensor:
        """Values as ``values`` says; ``index`` tells the tensors of one case apart."""
        generator = torch.Generator().manual_seed(self.seed * 16 + index)
        x = torch.randn(shape, generator=generator)
        if self.values == "extreme":
            chosen = torch.rand(shape, generator=generator) < 0.2
            x = torch.where(chosen, x.sign() * 1e4, x)
        return (x * {"small": 1e-4, "large": 1e4}.get(self.values, 1.0)).to(self.dtype)

    def normal(self, *shape: int, index: int = 0) -> torch.Tensor:
        """Normal values whatever ``values`` says: for weights and incoming gradients."""
        generator = torch.Generator().manual_seed(self.seed * 16 + index)
        return torch.randn(shape, generator=generator).to(self.dtype)

    def pick(self, limit: int) -> int:
        """Some number in [0, limit): the place of what a test plants."""
        return self.seed * 7919 % limit


def _shapes(rows: int) -> st.SearchStrategy[tuple[int, int]]:
    """Narrow ones of up to 70 rows, and wide ones of up to ``rows``."""
    narrow = st.tuples(st.integers(1, 70), st.integers(1, 300))
    return st.one_of(narrow, st.tuples(st.integers(1, rows), st.integers(1, 16384)))


def random_cases(test: Callable[..., None]) -> Callable[..., None]:
    thorough = settings().max_examples >= 1000
    cases = st.builds(
        lambda shape, **others: RandomCase(*shape, **others),
        shape=_shapes(70 if thorough else 4),
        dtype=st.sampled_from(DTYPES),
        values=st.sampled_from(VALUES),
        flag=st.booleans(),
        seed=st.integers(0, 2**20),
    )
    few = settings(max_examples=12, derandomize=True, deadline=None)
    return (settings() if thorough else few)(given(case=cases)(test))
