"""AdamW with masters in halves equals AdamW with float32 masters to the bit, on every backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastllm_core import _core
from fastllm_train.ops.adamw import adamw_, joined, split_

from .accuracy import DTYPES
from .random_inputs import CPU, RandomCase, random_cases

NUMBERS = (3e-3, 0.9, 0.95, 1e-8, 0.1)  # lr, betas, eps, decay
SIGNS = (0, 0x80000000)
# Magnitudes by their bits: zero, the smallest and largest denormals, 1, the largest numbers and
# infinity; each also next to where rounding to bfloat16 goes over, and half way.
MAGNITUDES = (
    *(0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x17FFF, 0x18000, 0x18001, 0x7FFFFF, 0x800000),
    *(0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F817FFF, 0x3F818000, 0x3F818001),
    *(0x7F7F0000, 0x7F7F7FFF, 0x7F7F8000, 0x7F7F8001, 0x7F7FFFFF, 0x7F800000),
)


def of_bits(bits: list[int]) -> torch.Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    """As int64, 0 to 2^32 - 1."""
    return values.view(torch.int32).to(torch.int64) & 0xFFFFFFFF


def extremes() -> torch.Tensor:
    return of_bits([sign | magnitude for sign in SIGNS for magnitude in MAGNITUDES])


def rounded(values: torch.Tensor) -> torch.Tensor:
    """To bfloat16, ties away from zero, by sign and magnitude; for all but NaN."""
    bits = bits_of(values)
    sign, magnitude = bits >> 31, bits & 0x7FFFFFFF
    upper = (sign << 15) | ((magnitude + 0x8000) >> 16)
    return (upper << 16).to(torch.int32).view(torch.float32).bfloat16()


def halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    upper = torch.empty(values.shape, dtype=torch.bfloat16)
    lower = torch.empty(values.shape, dtype=torch.int16)
    split_(values, upper, lower)
    return upper, lower


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """The same bits, but for what kind of NaN it is."""
    view = torch.int16 if a.dtype == torch.bfloat16 else torch.int32
    return bool(((a.view(view) == b.view(view)) | (a.isnan() & b.isnan())).all())


def test_split_and_joined() -> None:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(-(2**31), 2**31, (100_000,), generator=generator).to(torch.int32)
    for values in (extremes(), drawn.view(torch.float32)):
        upper, lower = halves(values)
        assert same(joined(upper, lower), values)
        number = ~values.isnan()
        assert same(upper[number], rounded(values[number]))
        assert torch.equal(upper.isnan(), values.isnan())
    assert drawn.view(torch.float32).isnan().any()
    assert halves(torch.tensor(1.0))[0].shape == ()


def test_ties_differ_from_rounding_to_even() -> None:
    """So the tests above see which way ties go; elsewhere the two agree."""
    values = extremes()
    tie = (bits_of(values) & 0xFFFF) == 0x8000
    even = (bits_of(values) >> 16) & 1 == 0
    differs = rounded(values).view(torch.int16) != values.bfloat16().view(torch.int16)
    assert torch.equal(differs, tie & even)
    assert differs.any()


@dataclass
class Both:
    """The same state on a backend with masters alone and in halves."""

    backend: Any
    alone: tuple[Any, Any, Any]
    halves: tuple[Any, Any, Any]
    upper: Any

    def step(
        self, grad: Any, step: int, scale: Any = None, numbers: tuple[float, ...] = NUMBERS
    ) -> None:
        for state, model in ((self.alone, None), (self.halves, self.upper)):
            call = (state[0], grad, *state[1:], model, scale, *numbers, step)
            self.backend.core.adamw(*call)
        self.backend.finish()

    def check(self) -> torch.Tensor:
        """The masters."""
        get = self.backend.get
        upper, lower, master = get(self.upper), get(self.halves[0]), get(self.alone[0])
        assert same(joined(upper, lower), master)
        number = ~master.isnan()
        assert same(upper[number], rounded(master[number]))
        assert torch.equal(upper.isnan(), master.isnan())
        for a, b in zip(self.alone[1:], self.halves[1:], strict=True):
            assert same(get(a), get(b))
        return master.clone()


def both(backend: Any, masters: torch.Tensor, offset: int = 0) -> Both:
    upper, lower = halves(masters)
    zero = torch.zeros_like(masters)
    return Both(
        backend,
        (backend.put(masters), backend.put(zero), backend.put(zero)),
        (backend.put(lower, offset), backend.put(zero), backend.put(zero)),
        backend.put(upper, offset),
    )


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 100, 4099])
def test_steps(backend: Any, count: int, grad_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(count)
    state = both(backend, torch.randn(count, generator=generator))
    before = state.check()
    for step in range(1, 4 if backend.cuda else 51):
        grad = torch.randn(count, generator=generator).to(grad_dtype)
        scale = backend.put(torch.tensor([0.25])) if step % 2 else None
        state.step(backend.put(grad), step, scale)
        state.check()
    assert (state.check() != before).all()


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    count = case.rows * case.cols
    state = both(CPU, case.normal(count, index=1).float())
    grad = case.tensor(count)
    grad[case.pick(count)] = float("nan") if case.flag else float("inf")
    scale = torch.tensor([0.25]) if case.flag else None
    for step in (1, 2):
        state.step(grad, step, scale)
        assert state.check().isnan().sum() == 1


def test_extremes_stay(backend: Any) -> None:
    """With a rate of 0 what is read is written again."""
    values = extremes()
    state = both(backend, values)
    state.step(backend.put(torch.zeros_like(values)), 1, None, (0.0, *NUMBERS[1:]))
    assert same(state.check(), values)


def test_extremes_move(backend: Any) -> None:
    """Past the largest number, to infinity, over zero, and to NaN."""
    values = extremes().repeat(4)
    grad = torch.tensor([1.0, -1.0, float("inf"), float("nan")]).repeat_interleave(len(values) // 4)
    state = both(backend, values)
    for step, lr in ((1, 1e-38), (2, 1.0), (3, 1e36)):
        state.step(backend.put(grad), step, None, (lr, *NUMBERS[1:]))
        masters = state.check()
    assert masters.isnan().sum() >= len(values) // 2


def test_unaligned(backend: Any) -> None:
    values = torch.randn(640, generator=torch.Generator().manual_seed(5))
    state = both(backend, values, offset=1)
    state.step(backend.put(values), 1)
    assert (state.check() != values).all()


@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_bytes_moved(counted: Any, grad_dtype: torch.dtype) -> None:
    count = 4096
    upper, lower = (counted.put(t) for t in halves(torch.randn(count)))
    moments = [counted.put(torch.zeros(count)) for _ in range(2)]
    grad = torch.randn(count).to(grad_dtype)
    counted.core.clear_counters()
    counted.core.adamw(lower, counted.put(grad), *moments, upper, None, *NUMBERS, 1)
    counted.finish()
    c = counted.core.counters()
    assert c["read_bytes"] == c["unique_read_bytes"] == 12 * count + grad.nbytes
    assert c["written_bytes"] == 12 * count
    assert c["sectors"] == c["min_sectors"]


def test_binding_refuses() -> None:
    upper, lower = halves(torch.randn(8))
    grad, exp_avg, exp_avg_sq = torch.zeros(3, 8)
    tensors = (lower, grad, exp_avg, exp_avg_sq)
    call: Any = _core.adamw
    call(*tensors, upper, None, *NUMBERS, 1)
    for arguments, message in (
        ((*tensors, None), "master is int16, the lower halves of masters: model must be given"),
        ((*tensors, upper.half()), "model is float16, expected bfloat16"),
        ((*tensors, upper[:7]), "model has shape"),
        ((*tensors, lower.view(torch.bfloat16)), "model overlaps master"),
        ((torch.zeros(16, dtype=torch.int16)[::2], *tensors[1:], upper), "master is not contig"),
        ((lower.int(), *tensors[1:], upper), "master has DLPack type code 0 with 32 bits"),
    ):
        with pytest.raises(ValueError, match=f"adamw: {message}"):
            call(*arguments, None, *NUMBERS, 1)


def test_opcheck() -> None:
    upper, lower = halves(torch.randn(40))
    grad, exp_avg, exp_avg_sq = torch.ones(3, 40)
    arguments = (lower, grad, exp_avg, exp_avg_sq, upper, torch.ones(1), *NUMBERS, 1)
    torch.library.opcheck(torch.ops.fastllm.adamw_.default, arguments)


def test_operator() -> None:
    values = torch.linspace(-2, 2, 101)
    upper, lower = halves(values)
    moments, others = torch.zeros(2, 101), torch.zeros(2, 101)
    lr, *betas, eps, decay = NUMBERS
    for step in range(1, 21):
        numbers = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": decay}
        grad = joined(upper, lower).sin()
        adamw_(lower, grad, *moments, **numbers, step=step, model=upper)
        adamw_(values, values.sin(), *others, **numbers, step=step)
    assert torch.equal(joined(upper, lower), values)
    assert torch.equal(upper, rounded(values))
