"""Products of float32 matrices at every vector level of the CPU, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastllm_core import _core
from fastllm_train.ops.matmul import linear, multiply_

from .accuracy import randoms

# Around the sizes of a tile (4 to 12 rows, 12 to 32 columns), of what is packed at a time (512
# terms, 192 columns, 2016 rows) and of one thread's work.
SHAPES = (
    (1, 1, 1), (12, 32, 64), (13, 33, 5), (100, 193, 513), (2017, 25, 7), (70, 400, 1100),
    (3, 40, 0),
)  # fmt: skip


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """``x`` with adjacent rows or columns, in a tensor of its own or as part of a wider one."""
    if "wide" in layout:
        x = F.pad(x, (2, 3, 1, 1), value=float("nan"))[1:-1, 2:-3]
    return x.t().contiguous().t() if "turned" in layout else x


def within(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor, added: float = 0.0) -> None:
    """Sums of k fused products, each within the rounding of a sum in any order."""
    want = a.double() @ b.double() + added
    terms = a.double().abs() @ b.double().abs() + abs(added)
    assert ((c.double() - want).abs() <= (4 + a.shape[1] ** 0.5) * 2.0**-24 * terms + 1e-37).all()


@pytest.mark.parametrize("layouts", [("", ""), ("turned", ""), ("", "turned"), ("wide", "wide")])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(
    cpu_level: str, shape: tuple[int, int, int], accumulate: bool, layouts: tuple[str, str]
) -> None:
    m, n, k = shape
    a, b = randoms((m, k), (k, n), dtype=torch.float32)
    memory = torch.full((m, n + 5), 0.5 if accumulate else float("nan"))
    c = memory[:, 2 : n + 2]
    _core.matmul(laid_out(a, layouts[0]), laid_out(b, layouts[1]), c, accumulate)
    within(c, a, b, 0.5 if accumulate else 0.0)
    rest = memory[:, [0, 1, n + 2, n + 3, n + 4]]
    assert (rest == 0.5).all() if accumulate else rest.isnan().all()


def test_nan_and_infinity_stay_in_their_row(cpu_level: str) -> None:
    a, b = randoms((40, 70), (70, 50), dtype=torch.float32)
    a[7, 3], a[20, 60] = float("nan"), float("inf")
    c = torch.empty(40, 50)
    _core.matmul(a, b, c, False)
    others = [i for i in range(40) if i not in (7, 20)]
    assert c[7].isnan().all()
    assert torch.equal(c[20].isinf(), b[60] != 0)
    within(c[others], a[others], b)


def test_same_bits_for_any_number_of_threads(
    cpu_level: str, threads: Callable[[int], None]
) -> None:
    a, b = randoms((333, 1025), (1025, 777), dtype=torch.float32)
    results: list[torch.Tensor] = []
    for count in (1, 2, 3, 4, 6):
        threads(count)
        c = torch.empty(333, 777)
        _core.matmul(a, b, c, False)
        results.append(c)
    assert all(torch.equal(c, results[0]) for c in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(4, 3), torch.ones(2, 5), torch.ones(4, 5)), r"b has shape \(2,5\)"),
        ((torch.ones(4, 3), torch.ones(3, 5), torch.ones(4, 4)), r"c has shape \(4,4\)"),
        ((torch.ones(4, 3).double(), torch.ones(3, 5), torch.ones(4, 5)), "a "),
        (
            (torch.ones(8, 6)[::2, ::2], torch.ones(3, 5), torch.ones(4, 5)),
            "a has neither adjacent",
        ),
        ((torch.ones(4, 3), torch.ones(3, 5), torch.ones(5, 4).t()), "columns that are not adj"),
        ((torch.ones(4, 3), torch.ones(3, 5), torch.ones(5).expand(4, 5)), "rows that overlap"),
        ((torch.ones(4), torch.ones(3, 5), torch.ones(4, 5)), "a has not two dimensions"),
    ],
)
def test_refusals(arguments: tuple[torch.Tensor, torch.Tensor, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"matmul: .*{message}"):
        _core.matmul(*arguments, False)


def test_refuses_an_output_that_is_an_input() -> None:
    a = torch.ones(4, 4)
    with pytest.raises(ValueError, match="overlap"):
        _core.matmul(a, torch.ones(4, 4), a, False)


@pytest.fixture(params=["kernel", "torch"])
def taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products that the kernel was given, with it and without it."""
    calls: list[str] = []
    kernel = _core.matmul

    def noted(a: object, b: object, c: object, accumulate: bool) -> None:
        calls.append("matmul")
        kernel(a, b, c, accumulate)

    monkeypatch.setattr(_core, "matmul", noted)
    monkeypatch.setattr(_core, "matmul_pays", lambda: request.param == "kernel")
    return calls


@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_torchs(
    taken: list[str], with_bias: bool, request: pytest.FixtureRequest
) -> None:
    x, w, b, dy = randoms((3, 50, 130), (70, 130), (70,), (3, 50, 70), dtype=torch.float32)
    leaves = [t.requires_grad_() for t in ((x, w, b) if with_bias else (x, w))]
    y = linear(*leaves)
    got = (y, *torch.autograd.grad(y, leaves, dy))
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    z = F.linear(*doubles)
    want = (z, *torch.autograd.grad(z, doubles, dy.double()))
    for a, e in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-5, atol=1e-4)
    assert len(taken) == (3 if "kernel" in request.node.callspec.id else 0)


def test_linear_computes_only_the_gradients_that_are_asked_for(
    taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "matmul_pays", lambda: True)
    x, w = randoms((200, 130), (70, 130), dtype=torch.float32)
    linear(x, w.requires_grad_()).sum().backward()
    assert x.grad is None
    assert len(taken) == 2


def test_what_the_kernel_does_not_take_is_torchs(
    taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "matmul_pays", lambda: True)
    x, w = randoms((200, 130), (70, 130), dtype=torch.float32)
    assert torch.equal(linear(x.double(), w.double()), F.linear(x.double(), w.double()))
    assert linear(x.bfloat16(), w.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, w).dtype == torch.bfloat16
    assert linear(x.to("meta"), w.to("meta")).shape == (200, 70)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), F.linear(x, w))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        linear(x, w[:, :7])
    assert linear(x[:1], w[:1]).shape == (1, 1)  # too little to do
    assert not taken


def test_multiply_into_and_onto(taken: list[str]) -> None:
    a, b = randoms((150, 130), (130, 170), dtype=torch.float32)
    out = torch.full((150, 170), float("nan"))
    version = out._version
    assert multiply_(out, a, b) is out
    within(out, a, b)
    assert out._version > version
    multiply_(out.fill_(2.0), a, b, accumulate=True)
    within(out, a, b, 2.0)


def test_multiply_keeps_no_gradients(taken: list[str]) -> None:
    """Inside an operator's own forward pass there are none; elsewhere torch refuses ``out``."""
    a, b = randoms((150, 130), (130, 170), dtype=torch.float32)
    with pytest.raises(RuntimeError, match="out="):
        multiply_(torch.empty(150, 170), a.requires_grad_(), b)
    assert not taken
