"""Rotary embedding on every backend against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllm_core import _core
from fastllm_train.ops.rope import rope

from .accuracy import DENORMAL, DTYPES, ROUNDING, assert_within
from .random_inputs import CPU, RandomCase, random_cases


def tables(rows: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    frequency = 10000.0 ** -(torch.arange(pairs) / max(pairs, 1))
    angle = torch.arange(rows)[:, None] * frequency
    return angle.cos(), angle.sin()


def tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


def pairs_of(x: torch.Tensor, pairs: int, interleaved: bool) -> tuple[torch.Tensor, torch.Tensor]:
    if interleaved:
        return x[..., 0 : 2 * pairs : 2], x[..., 1 : 2 * pairs : 2]
    return x[..., :pairs], x[..., pairs : 2 * pairs]


def reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    interleaved: bool,
    inverse: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64, and the sum of the magnitudes of what was added."""
    rows = torch.arange(x.shape[1])[None] if positions is None else positions
    c = cos.double()[rows][:, :, None]
    s = sin.double()[rows][:, :, None] * (-1 if inverse else 1)
    y = x.double().clone()
    terms = y.abs()
    a, b = pairs_of(x.double(), cos.shape[1], interleaved)
    first, second = pairs_of(y, cos.shape[1], interleaved)
    first.copy_(a * c - b * s)
    second.copy_(b * c + a * s)
    first_terms, second_terms = pairs_of(terms, cos.shape[1], interleaved)
    first_terms.copy_((a * c).abs() + (b * s).abs())
    second_terms.copy_((b * c).abs() + (a * s).abs())
    return y, terms


def run(
    backend: Any,
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    inverse: bool = False,
    offset: int = 0,
) -> torch.Tensor:
    y = backend.empty(tuple(x.shape), x.dtype)
    on_device = None if positions is None else backend.put(positions)
    arguments = (backend.put(x, offset), backend.put(cos), backend.put(sin), on_device, y)
    backend.core.rope(*arguments, interleaved, inverse)
    backend.finish()
    return backend.get(y)


def check(y: torch.Tensor, expected: torch.Tensor, terms: torch.Tensor) -> None:
    bound = expected.abs() * ROUNDING[y.dtype] + terms * 3e-7 + DENORMAL[y.dtype]
    assert_within(y, expected, bound)


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "pairs"),
    [
        ((2, 5, 3, 128), 64),
        ((1, 7, 2, 80), 40),
        ((2, 3, 1, 64), 16),  # partly rotated
        ((1, 4, 5, 30), 15),  # no 16-byte access divides it
        ((1, 2, 40, 2), 1),
        ((1, 1, 2, 600), 300),
    ],
    ids=str,
)
def test_values(
    backend: Any, shape: tuple[int, ...], pairs: int, dtype: torch.dtype, interleaved: bool
) -> None:
    x = tensor(shape, dtype)
    cos, sin = tables(shape[1], pairs)
    y = run(backend, x, cos, sin, None, interleaved)
    check(y, *reference(x, cos, sin, None, interleaved))
    assert torch.equal(y[..., 2 * pairs :], x[..., 2 * pairs :])
    back = run(backend, x, cos, sin, None, interleaved, inverse=True)
    check(back, *reference(x, cos, sin, None, interleaved, inverse=True))


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    head_dim = 2 * (1 + case.pick(150))
    pairs = 1 + case.seed % (head_dim // 2)
    x = case.tensor(1, case.rows, max(1, case.cols // head_dim), head_dim)
    cos, sin = tables(case.rows + 9, pairs)
    positions = torch.arange(case.rows).flip(0)[None] + 9 if case.seed % 2 else None
    check(
        run(CPU, x, cos, sin, positions, case.flag), *reference(x, cos, sin, positions, case.flag)
    )
    x[0, case.pick(case.rows), 0, case.pick(head_dim)] = float("nan")
    y = run(CPU, x, cos, sin, positions, case.flag, inverse=True)
    check(y, *reference(x, cos, sin, positions, case.flag, inverse=True))


def test_positions(backend: Any) -> None:
    """Two packed sequences in the first row, an offset in the second."""
    x = tensor((2, 6, 2, 16), torch.bfloat16)
    cos, sin = tables(40, 8)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1], [30, 31, 32, 33, 34, 35]])
    check(run(backend, x, cos, sin, positions), *reference(x, cos, sin, positions, False))


def test_position_outside_of_the_tables_is_nan(backend: Any) -> None:
    x = tensor((1, 3, 2, 16), torch.float32)
    cos, sin = tables(10, 4)
    y = run(backend, x, cos, sin, torch.tensor([[10, 9, -1]]))
    assert y[0, [0, 2], :, :8].isnan().all()
    assert not y[0, 1].isnan().any()
    assert torch.equal(y[..., 8:], x[..., 8:])


def test_nan_stays_in_its_pair(backend: Any) -> None:
    x = tensor((1, 2, 2, 32), torch.float16)
    x[0, 1, 1, 5] = float("nan")
    cos, sin = tables(2, 16)
    found = run(backend, x, cos, sin).isnan().nonzero().tolist()
    assert found == [[0, 1, 1, 5], [0, 1, 1, 21]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(backend: Any, dtype: torch.dtype) -> None:
    x = tensor((1, 3, 2, 64), dtype)
    cos, sin = tables(3, 32)
    check(run(backend, x, cos, sin, offset=1), *reference(x, cos, sin, None, False))


def test_empty(backend: Any) -> None:
    cos, sin = tables(4, 8)
    assert run(backend, tensor((0, 4, 2, 16), torch.float32), cos, sin).shape == (0, 4, 2, 16)


def test_in_place(backend: Any) -> None:
    x = tensor((2, 3, 4, 64), torch.bfloat16)
    cos, sin = tables(3, 20)
    on_device = backend.put(x)
    backend.core.rope(on_device, backend.put(cos), backend.put(sin), None, on_device, True, False)
    backend.finish()
    assert torch.equal(backend.get(on_device), run(backend, x, cos, sin, None, True))


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_moved(counted: Any, dtype: torch.dtype, interleaved: bool) -> None:
    x = tensor((2, 3, 4, 128), dtype)
    cos, sin = tables(3, 64)
    run(counted, x, cos, sin, None, interleaved)
    c = counted.core.counters()
    assert c["written_bytes"] == c["unique_written_bytes"] == x.nbytes
    assert c["unique_read_bytes"] == x.nbytes + cos.nbytes + sin.nbytes
    assert c["read_bytes"] <= 1.05 * x.nbytes + 8 * 2 * (cos.nbytes + sin.nbytes)
    # Of the tables a thread reads a whole sector in two loads, the second from the L1 cache.
    assert c["sectors"] - c["min_sectors"] <= (c["read_bytes"] - x.nbytes) // 32


def test_binding_refuses() -> None:
    x = tensor((1, 4, 2, 16), torch.float32)
    cos, sin = tables(4, 8)
    y = torch.empty_like(x)

    def call(**changes: Any) -> None:
        arguments: dict[str, Any] = {"x": x, "cos": cos, "sin": sin, "positions": None, "y": y}
        _core.rope(**(arguments | changes), interleaved=False, inverse=False)

    call()
    for changes, message in (
        ({"x": x[0]}, "x has not 4 dimensions"),
        ({"cos": cos.double()}, "cos has DLPack type code 2 with 64 bits"),
        ({"cos": torch.ones(4, 9), "sin": torch.ones(4, 9)}, "cos has more pairs than x has"),
        ({"cos": cos[:3], "sin": sin[:3]}, "cos has fewer rows than x has tokens"),
        ({"positions": torch.zeros(1, 4)}, "positions is not int64"),
        ({"positions": torch.zeros(4, 1, dtype=torch.int64)}, r"positions has shape \(4,1\)"),
        ({"x": x.transpose(2, 3), "y": y.transpose(2, 3)}, "x has channels that are not adjacent"),
        ({"y": x.flatten()[:128].view(1, 4, 2, 16).transpose(1, 2)}, "y has shape"),
    ):
        with pytest.raises(ValueError, match=f"rope: {message}"):
            call(**changes)


# --- the torch operator ------------------------------------------------------------------------


def test_opcheck() -> None:
    x = tensor((2, 4, 3, 16), torch.float32).requires_grad_()
    cos, sin = tables(6, 8)
    positions = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 5]])
    op = torch.ops.fastllm.rope.default
    torch.library.opcheck(op, (x, cos, sin, None, False, False))
    torch.library.opcheck(op, (x, cos, sin, positions, True, True))


def test_strided_input_is_not_copied() -> None:
    x = tensor((2, 3, 5, 16), torch.bfloat16)
    cos, sin = tables(5, 8)
    turned = x.transpose(1, 2)  # (batch, tokens, heads, head_dim) of a heads-first tensor
    y = rope(turned, cos, sin)
    assert y.stride() == turned.stride()
    assert torch.equal(y, rope(turned.contiguous(), cos, sin))
    qkv = tensor((2, 5, 9 * 16), torch.bfloat16).unflatten(-1, (9, 16))
    assert torch.equal(rope(qkv[:, :, 2:6], cos, sin), rope(qkv[:, :, 2:6].contiguous(), cos, sin))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_gradients_through_autograd(interleaved: bool, compiler: str | None) -> None:
    x = tensor((2, 4, 3, 20), torch.float32).requires_grad_()
    cos, sin = tables(4, 8)

    def function(x: torch.Tensor) -> torch.Tensor:
        return rope(x, cos, sin, interleaved=interleaved).sin().sum()

    run = torch.compile(function, fullgraph=True, backend=compiler) if compiler else function
    (got,) = torch.autograd.grad(run(x), x)
    y, _ = reference(x.detach(), cos, sin, None, interleaved)
    want, _ = reference(y.cos(), cos, sin, None, interleaved, inverse=True)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
