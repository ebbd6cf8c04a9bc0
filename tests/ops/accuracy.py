"""How far a result may be from float64, by the dtype it is rounded to."""

from __future__ import annotations

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Half a unit in the last place, relative: the one rounding that a result takes.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Smallest denormal, which bounds the absolute error of rounding near zero.
DENORMAL = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}
# What float32 arithmetic adds: sums in an order of the kernel's choosing, rsqrt to 2 ulp on a GPU.
ARITHMETIC = 4e-6


def randoms(
    *shapes: tuple[int, ...], dtype: torch.dtype, scale: float = 1.0, seed: int = 0
) -> list[torch.Tensor]:
    """Normal values, the same for the same shapes and seed."""
    generator = torch.Generator().manual_seed(seed * 1000003 + hash(shapes) % 1000003)
    return [(torch.randn(s, generator=generator) * scale).to(dtype) for s in shapes]


def assert_within(actual: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> None:
    """``actual`` is ``expected`` up to ``bound``, NaN exactly where that is, and infinite only
    where that is beyond the dtype's range or infinite itself.
    """
    assert actual.shape == expected.shape
    assert torch.equal(actual.isnan(), expected.isnan())
    if actual.numel() == 0:
        return
    largest = torch.finfo(actual.dtype).max
    within_range = expected.abs().clamp(max=largest).copysign(expected)
    saturated = actual.double().clamp(-largest, largest)
    error = (saturated - within_range).abs()
    over = torch.where(expected.isnan(), -1.0, error - bound.nan_to_num(0.0, posinf=0.0))
    assert over.max() <= 0, f"error {error.flatten()[over.argmax()]:.3g} is over its bound"
    out_of_range = actual.isinf() & (expected.abs() + bound < largest)
    assert not out_of_range.any(), "infinite where the result is in range"


def rounded(expected: torch.Tensor, dtype: torch.dtype, terms: torch.Tensor) -> torch.Tensor:
    """The bound for a result that is a sum of ``terms`` (their absolute values, summed)."""
    return expected.abs() * ROUNDING[dtype] + terms * ARITHMETIC + DENORMAL[dtype]
