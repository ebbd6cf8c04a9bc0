"""Softmax of attention scores on every backend against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastllm_core import _core
from fastllm_train.ops.softmax import softmax

from .accuracy import ARITHMETIC, DENORMAL, DTYPES, ROUNDING, assert_within, randoms, rounded
from .random_inputs import CPU, RandomCase, random_cases

SHAPES = ((1, 1, 1, 1), (2, 3, 5, 33), (1, 2, 7, 1000), (2, 1, 3, 2048), (1, 1, 2, 9000))
FORMS = ("plain", "causal", "mask", "alibi", "all")
SCALE = 0.37


def extras(
    form: str, shape: tuple[int, ...]
) -> tuple[bool, torch.Tensor | None, torch.Tensor | None]:
    """causal, a mask that broadcasts over heads, slopes."""
    batch, heads, queries, keys = shape
    generator = torch.Generator().manual_seed(keys)
    mask = torch.rand(batch, 1, queries, keys, generator=generator) < 0.7
    mask[0, 0, -1] = False
    slopes = 2.0 ** -torch.arange(1.0, heads + 1)
    return (
        form in ("causal", "all"),
        mask if form in ("mask", "all") else None,
        slopes if form in ("alibi", "all") else None,
    )


def taking_part(shape: tuple[int, ...], causal: bool, mask: torch.Tensor | None) -> torch.Tensor:
    queries, keys = shape[-2:]
    here = torch.ones(shape, dtype=torch.bool)
    if causal:
        here &= torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
    return here if mask is None else here & mask


def fwd(
    backend: Any,
    x: torch.Tensor,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    offset: int = 0,
) -> torch.Tensor:
    y = backend.empty(tuple(x.shape), x.dtype, offset)
    backend.core.softmax_fwd(
        backend.put(x, offset),
        None if mask is None else backend.put(mask),
        None if slopes is None else backend.put(slopes),
        y,
        SCALE,
        causal,
    )
    backend.finish()
    return backend.get(y)


def bwd(
    backend: Any, dy: torch.Tensor, y: torch.Tensor, causal: bool = False, offset: int = 0
) -> torch.Tensor:
    dx = backend.empty(tuple(dy.shape), dy.dtype, offset)
    backend.core.softmax_bwd(backend.put(dy), backend.put(y), dx, SCALE, causal)
    backend.finish()
    return backend.get(dx)


def check(
    y: torch.Tensor,
    x: torch.Tensor,
    causal: bool,
    mask: torch.Tensor | None,
    slopes: torch.Tensor | None,
) -> None:
    here = taking_part(tuple(x.shape), causal, mask)
    v = x.double() * SCALE
    magnitude = v.abs()
    if slopes is not None:
        queries, keys = x.shape[-2:]
        distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
        v = v + slopes.double()[:, None, None] * distance
        magnitude = magnitude + slopes.double()[:, None, None] * keys
    v = torch.where(here, v, -torch.inf)
    # Where nothing takes part, torch has NaN and the kernel 0.
    expected = torch.where((v == -torch.inf).all(-1, keepdim=True), 0.0, v.softmax(-1))
    spread = (v - v.amax(-1, keepdim=True)).abs().nan_to_num(0.0, posinf=0.0)
    # The score is rounded to float32, and exp has the relative error of its argument.
    relative = (
        ROUNDING[y.dtype]
        + 2 * ARITHMETIC
        + 4e-7 * spread
        + 3e-7 * magnitude.amax(-1, keepdim=True).nan_to_num(0.0, posinf=0.0)
    )
    assert_within(y, expected, expected * relative + DENORMAL[y.dtype] + 1e-37)
    assert not y[~here].any()


def check_bwd(dx: torch.Tensor, dy: torch.Tensor, y: torch.Tensor) -> None:
    y64, d = y.double(), dy.double()
    dot = (y64 * d).sum(-1, keepdim=True)
    expected = SCALE * y64 * (d - dot)
    terms = SCALE * y64 * (d.abs() + (y64 * d.abs()).sum(-1, keepdim=True))
    # y * scale may be denormal before it meets dy.
    assert_within(dx, expected, rounded(expected, dx.dtype, terms) + 1e-37)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(backend: Any, shape: tuple[int, ...], dtype: torch.dtype, form: str) -> None:
    if backend.name == "emulated" and shape[-1] > 2048 and form in ("mask", "alibi"):
        pytest.skip("the longest rows are emulated in the other forms")
    x, dy = randoms(shape, shape, dtype=dtype, scale=3.0)
    causal, mask, slopes = extras(form, shape)
    y = fwd(backend, x, causal, mask, slopes)
    check(y, x, causal, mask, slopes)
    check_bwd(bwd(backend, dy, y, causal), dy, y)


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    heads = 2 if case.rows % 2 == 0 else 1
    shape = (1, heads, case.rows // heads, case.cols)
    x, dy = case.tensor(*shape), case.normal(*shape, index=1)
    x[0, 0, case.pick(shape[2])] = -torch.inf  # a row of nothing
    form = FORMS[case.seed % len(FORMS)]
    causal, mask, slopes = extras(form, shape)
    y = fwd(CPU, x, causal, mask, slopes)
    check(y, x, causal, mask, slopes)
    assert not y[0, 0, case.pick(shape[2])].any()
    check_bwd(bwd(CPU, dy, y, causal), dy, y)

    x[0, 0, -1, case.pick(case.cols)] = torch.nan
    check(fwd(CPU, x), x, False, None, None)


@pytest.mark.parametrize("scale", [1e-3, 1e4], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_values(backend: Any, dtype: torch.dtype, scale: float) -> None:
    (x,) = randoms((1, 2, 3, 300), dtype=dtype, scale=scale)
    x[0, 0, 1, ::7] = -torch.inf
    check(fwd(backend, x), x, False, None, None)


def test_rows_of_nothing_are_zero(backend: Any) -> None:
    (x,) = randoms((1, 1, 6, 3), dtype=torch.float32)
    y = fwd(backend, x, causal=True)  # the first three queries are before every key
    assert not y[0, 0, :3].any()
    torch.testing.assert_close(y[0, 0, 3:].sum(-1), torch.ones(3))
    assert not fwd(backend, torch.full((1, 1, 2, 40), -torch.inf)).any()


def test_nan_stays_in_its_row(backend: Any) -> None:
    (x,) = randoms((1, 1, 9, 41), dtype=torch.bfloat16)
    x[0, 0, 4, 30] = torch.nan
    x[0, 0, 6, 40] = torch.nan  # where causal rows do not look
    y = fwd(backend, x, causal=True)
    places = 41 - 9 + 4 + 1
    assert y[0, 0, 4, :places].isnan().all()
    assert not y[0, 0, 4, places:].any()
    assert not y[0, 0, [0, 1, 2, 3, 5, 6, 7, 8]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_and_in_place(backend: Any, dtype: torch.dtype) -> None:
    x, dy = randoms((1, 2, 5, 264), (1, 2, 5, 264), dtype=dtype)
    y = fwd(backend, x, causal=True)
    torch.testing.assert_close(fwd(backend, x, causal=True, offset=1), y)
    on_device = backend.put(x)
    backend.core.softmax_fwd(on_device, None, None, on_device, SCALE, True)
    backend.finish()
    assert torch.equal(backend.get(on_device), y)
    dx = bwd(backend, dy, y, causal=True)
    torch.testing.assert_close(bwd(backend, dy, y, causal=True, offset=1), dx)
    on_device = backend.put(dy)
    backend.core.softmax_bwd(on_device, backend.put(y), on_device, SCALE, True)
    backend.finish()
    assert torch.equal(backend.get(on_device), dx)


def test_same_bits_for_any_schedule(emulated: Any) -> None:
    (x,) = randoms((1, 2, 3, 3000), dtype=torch.float32)
    results = []
    for seed in range(3):
        emulated.core.set_options(schedule=seed)
        y = fwd(emulated, x, causal=True)
        results.append((y, bwd(emulated, x, y, causal=True)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_moved(counted: Any, dtype: torch.dtype) -> None:
    """Each score is read once and written once; of causal rows only what takes part is read."""
    shape = (1, 2, 64, 2048)
    x, dy = randoms(shape, shape, dtype=dtype)
    y = fwd(counted, x)
    c = counted.core.counters()
    assert (c["read_bytes"], c["written_bytes"]) == (x.nbytes, x.nbytes)
    assert c["sectors"] == c["min_sectors"]
    assert c["wavefronts"] == c["min_wavefronts"]
    counted.core.clear_counters()
    bwd(counted, dy, y)
    c = counted.core.counters()
    assert (c["read_bytes"], c["written_bytes"]) == (2 * x.nbytes, x.nbytes)
    assert c["sectors"] == c["min_sectors"]
    counted.core.clear_counters()
    square = x[:, :, :, :64].contiguous()
    fwd(counted, square, causal=True)
    assert counted.core.counters()["read_bytes"] < 0.7 * square.nbytes


def test_binding_refuses() -> None:
    x = torch.zeros(2, 3, 4, 5)
    y = torch.empty_like(x)
    mask = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    for arguments, message in (
        ((x[0], None, None, y), "x has not the shape"),
        ((x, mask.float(), None, y), "mask is not bool or uint8"),
        ((x, mask[:, :, :3], None, y), "mask does not broadcast to the shape of x"),
        ((x, mask[..., :2], None, y), "mask has not 4 dimensions with the adjacent columns"),
        ((x, None, torch.ones(2), y), r"slopes has shape \(2,\), expected \(3,\)"),
        ((x, None, None, y.half()), "y is float16, expected float32"),
    ):
        with pytest.raises(ValueError, match=f"softmax_fwd: {message}"):
            _core.softmax_fwd(*arguments, 1.0, False)


# --- the torch operator ------------------------------------------------------------------------


def test_opcheck() -> None:
    (x,) = randoms((2, 3, 4, 9), dtype=torch.float32)
    causal, mask, slopes = extras("all", (2, 3, 4, 9))
    x.requires_grad_()
    for arguments in ((x, mask, slopes, SCALE, causal), (x, None, None, SCALE, False)):
        torch.library.opcheck(torch.ops.fastllm.softmax_fwd.default, arguments)
    y = x.detach().softmax(-1)
    torch.library.opcheck(torch.ops.fastllm.softmax_bwd.default, (y, y, SCALE, True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_gradients_through_autograd(compiler: str | None) -> None:
    (x,) = randoms((2, 3, 6, 9), dtype=torch.float32)
    mask = extras("mask", (2, 3, 6, 9))[1]
    assert mask is not None
    mask[0, 0, -1, 0] = True  # torch has no zero rows
    x.requires_grad_()

    def function(t: torch.Tensor) -> torch.Tensor:
        return softmax(t, scale=SCALE, mask=mask).transpose(0, 3).sin().sum()

    run = torch.compile(function, fullgraph=True, backend=compiler) if compiler else function
    (got,) = torch.autograd.grad(run(x), x)
    x64 = x.detach().double().requires_grad_()
    y = (x64 * SCALE).masked_fill(~mask, -torch.inf).softmax(-1)
    (want,) = torch.autograd.grad(y.sin().sum(), x64)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_mask_of_any_strides() -> None:
    (x,) = randoms((2, 3, 4, 9), dtype=torch.float32)
    mask = torch.rand(9, 4).t()[None, None] < 0.8
    expected = (x * SCALE).masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(softmax(x, scale=SCALE, mask=mask), expected)
    one = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    torch.testing.assert_close(softmax(x, mask=one), x.softmax(-1))
