"""Causal attention at every vector level of the CPU, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastllm_core import _core
from fastllm_train.ops.attention import causal_attention, takes_attention

from .accuracy import DTYPES, randoms

Tensors = tuple[torch.Tensor, ...]
# batch, length, heads, kv_heads, dim: around blocks of 64 queries, panels of 8 rows, 32 channels.
SHAPES = (
    (1, 1, 1, 1, 16), (2, 3, 2, 1, 32), (1, 63, 2, 2, 48), (1, 64, 4, 4, 64), (2, 65, 4, 2, 64),
    (1, 130, 6, 2, 80), (1, 200, 2, 2, 128), (1, 321, 1, 1, 256),
)  # fmt: skip


def inputs(shape: tuple[int, ...], scale: float = 1.0) -> Tensors:
    """q, k, v and the gradient of the output."""
    batch, length, heads, kv_heads, dim = shape
    query, key = (batch, length, heads, dim), (batch, length, kv_heads, dim)
    return tuple(randoms(query, key, key, query, dtype=torch.float32, scale=scale))


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * scale
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def with_gradients(
    function: Callable[..., torch.Tensor], tensors: Tensors, dout: torch.Tensor
) -> Tensors:
    leaves = tuple(t.detach().requires_grad_() for t in tensors)
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout))


def assert_near(got: Tensors, want: Tensors, tolerance: float = 4e-6) -> None:
    """Relative to the largest value of each."""
    for a, b in zip(got, want, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= tolerance * max(b.abs().max().item(), 1e-30)


@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(cpu_level: str, shape: tuple[int, ...], scale: float | None) -> None:
    *tensors, dout = inputs(shape)
    got = with_gradients(
        lambda q, k, v: causal_attention(q, k, v, scale=scale), tuple(tensors), dout
    )
    doubles = tuple(t.double() for t in tensors)
    factor = shape[-1] ** -0.5 if scale is None else scale
    want = with_gradients(lambda q, k, v: by_definition(q, k, v, factor), doubles, dout.double())
    # Of the gradients of a single key, which are 0, the rounding of dout . v - dout . out is left.
    if shape[1] == 1:
        assert max(got[1].abs().max().item(), got[2].abs().max().item()) <= 1e-5
        got, want = (got[0], got[3]), (want[0], want[3])
    assert_near(got, want, 2e-5)


def test_large_scores_keep_their_largest(cpu_level: str) -> None:
    """Scores of some thousands, of which exp overflows; nearly all weight is on one key."""
    q, k, v, dout = inputs((1, 150, 2, 2, 32))
    q, k = q * 40, k * 40
    out, *gradients = with_gradients(causal_attention, (q, k, v), dout)
    want = by_definition(q.double(), k.double(), v.double(), 32**-0.5)
    assert all(x.isfinite().all() for x in (out, *gradients))
    # A score of 2^13 is rounded to 2^-10, and its exponential with it.
    assert (out.double() - want).abs().max() <= 4e-3 * v.abs().max()


def test_later_tokens_change_nothing(cpu_level: str) -> None:
    q, k, v, _ = inputs((1, 200, 2, 1, 32))
    whole = causal_attention(q, k, v)
    for length in (1, 64, 100, 193):
        part = causal_attention(q[:, :length], k[:, :length], v[:, :length])
        assert torch.equal(part, whole[:, :length])


def test_nan_stays_with_the_queries_that_see_it(cpu_level: str) -> None:
    q, k, v, _ = inputs((1, 100, 2, 2, 16))
    k[0, 70, 1] = float("nan")
    out = causal_attention(q, k, v)
    assert out[0, 70:, 1].isnan().all()
    assert out[0, :64, 1].isfinite().all()
    assert out[0, :, 0].isfinite().all()


def test_views_are_not_copied_and_give_the_same(cpu_level: str) -> None:
    """q, k and v as parts of one product, and as heads before tokens."""
    q, k, v, dout = inputs((2, 70, 2, 2, 32))
    want = with_gradients(causal_attention, (q, k, v), dout)
    joined = torch.cat((q, k, v), dim=2)
    parts = joined.split(2, dim=2)
    turned = tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    for tensors in (parts, turned):
        got = with_gradients(causal_attention, tuple(tensors), dout)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    every_second = torch.stack((q, q), dim=-1).flatten(-2)[..., ::2]  # copied
    assert torch.equal(causal_attention(every_second, k, v), want[0])


def test_same_bits_for_any_number_of_threads(
    cpu_level: str, threads: Callable[[int], None]
) -> None:
    *tensors, dout = inputs((2, 150, 6, 3, 32))
    results: list[Tensors] = []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(with_gradients(causal_attention, tuple(tensors), dout))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
def test_operator_is_registered_as_torch_wants() -> None:
    q, k, v, dout = inputs((1, 20, 4, 2, 16))
    leaves = tuple(t.requires_grad_() for t in (q, k, v))
    torch.library.opcheck(torch.ops.fastllm.attention_fwd.default, (*leaves, 0.25))
    with torch.no_grad():
        out, lse = torch.ops.fastllm.attention_fwd(q, k, v, 0.25)
        torch.library.opcheck(
            torch.ops.fastllm.attention_bwd.default, (dout, q, k, v, out, lse, 0.25)
        )
    compiled: Any = torch.compile(causal_attention, fullgraph=True, backend="aot_eager")
    got = with_gradients(compiled, (q, k, v), dout)
    want = with_gradients(causal_attention, (q, k, v), dout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_lse_is_the_logarithm_of_the_sum(cpu_level: str) -> None:
    q, k, v, _ = inputs((1, 90, 2, 2, 16))
    lse = torch.ops.fastllm.attention_fwd(q, k, v, 0.25)[1]
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * 0.25
    later = torch.ones(90, 90, dtype=torch.bool).triu(1)
    want = scores.masked_fill(later, -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse.double(), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5, 2, 2, 16), (2, 0, 2, 2, 16)], ids=str)
def test_nothing_to_do(shape: tuple[int, ...]) -> None:
    *tensors, dout = inputs(shape)
    got = with_gradients(causal_attention, tuple(tensors), dout)
    assert [t.numel() for t in got] == [0] * 4


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 5, 4, 24), (1, 5, 4, 24)), "q has heads whose dim is not a multiple of 16"),
        (((1, 5, 4, 272), (1, 5, 4, 272)), "q has heads whose dim is not a multiple of 16"),
        (((1, 5, 4, 16), (1, 6, 4, 16)), r"k has shape \(1,6,4,16\)"),
        (((1, 5, 4, 16), (1, 5, 3, 16)), "k has a number of heads that does not divide"),
        (((5, 4, 16), (5, 4, 16)), "not enough values|q has not the shape"),
    ],
)
def test_refusals(shapes: tuple[tuple[int, ...], tuple[int, ...]], message: str) -> None:
    q, k = (torch.ones(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        causal_attention(q, k, k)


def test_what_it_takes() -> None:
    q = torch.ones(1, 5, 2, 16)
    assert all(takes_attention(q.to(dtype)) for dtype in DTYPES)
    assert not takes_attention(q.double())
    assert not takes_attention(q.to("meta"))
    assert not any(takes_attention(torch.ones(1, 5, 2, dim)) for dim in (20, 272))
    with pytest.raises(ValueError, match="k is bfloat16, expected float32"):
        _core.attention_fwd(q, q.bfloat16(), q, q.clone(), torch.empty(1, 2, 5), 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    *tensors, dout = (t.to(dtype) for t in inputs((2, 130, 4, 2, 32)))
    out = causal_attention(*tensors)
    assert torch.equal(out, causal_attention(*(t.float() for t in tensors)).to(dtype))
    got = with_gradients(causal_attention, tuple(tensors), dout)
    doubles = tuple(t.double() for t in tensors)
    want = with_gradients(lambda q, k, v: by_definition(q, k, v, 32**-0.5), doubles, dout.double())
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= 2 * torch.finfo(dtype).eps * b.abs().max()
