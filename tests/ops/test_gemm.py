"""The CUTLASS products, as the PTX that nvcc emits, against float64, under the checker."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DTYPES = (torch.bfloat16, torch.float16)
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# Odd row counts, sizes that fill no tile, one tile exactly, depths below and above the pipeline's.
SHAPES = ((1, 8, 8), (67, 136, 96), (128, 128, 128), (130, 72, 264))
# On an emulated sm_90: more tiles than the two multiprocessors, depths above the pipeline's stages.
HOPPER_SHAPES = ((1, 8, 8), (67, 136, 96), (130, 264, 520))
Case = tuple[tuple[int, int, int], int | None]  # m, n, k; on sm_90: the emulator's schedule
CASES: list[Any] = [
    *(pytest.param((shape, None), id=f"sm80-{shape}") for shape in SHAPES[1:]),
    *(
        pytest.param((shape, schedule), id=f"sm90-{shape}-{schedule}")
        for shape, schedule in zip(HOPPER_SHAPES, (0, 1, 5), strict=True)
    ),
]
# By what the names of the kernels for sm_90a differ.
HOPPER_KERNELS = {
    "linear_bias": "LinCombPerColBiasI",
    "linear_bias_gelu": "LinCombPerColBiasEltActAuxI",
    "linear_swiglu": "SiLu",
    "linear_weight_grad": "17LinearCombinationIffff",
    "grouped_linear": "MainloopSm90Array",
}


@pytest.fixture
def gemm(emulated_gemm_module: Any, emulated_backend: Any) -> Iterator[Any]:
    emulated_gemm_module.set_options()
    emulated_gemm_module.clear_reports()
    yield emulated_backend(emulated_gemm_module, "gemm")
    emulated_gemm_module.set_options()


@pytest.fixture
def dtype(request: pytest.FixtureRequest, gemm: Any) -> torch.dtype:
    wanted: torch.dtype = request.param
    if str(wanted).removeprefix("torch.") not in gemm.core.gemm_dtypes():
        pytest.skip(f"the products were compiled without {wanted}; `make test-cutlass` does")
    return wanted


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got: torch.Tensor, want: torch.Tensor, terms: torch.Tensor, roundings: int = 1) -> None:
    """``terms``: the sum of the absolute products, to which float32's error is relative."""
    dtype = got.dtype
    bound = want.abs() * ROUNDING.get(dtype, 2.0**-24) * roundings + terms * 2e-6 + 2.0**-24
    assert ((got.double() - want).abs() <= bound).all()


ALLOWED = tomllib.loads(Path(__file__).with_name("emulator_allowed.toml").read_text())["allowed"]


def fits(
    entry: dict[str, Any], report: tuple[str, str, str], op: str, size: tuple[int, int, int]
) -> bool:
    """``size``: rows and columns of the result, depth."""
    kind, kernel, text = report
    rows, cols, depth = size
    depth = (depth + 31) // 32 * 32  # in whole steps
    whole = rows % 128 == 0 and cols % 128 == 0
    return (
        entry["op"] == op
        and entry["kind"] == kind
        and re.search(entry["kernel"], kernel) is not None
        and re.search(rf"line \d+, {entry['instruction']}", text) is not None
        and (depth == entry["from"] if whole else depth >= entry["from"])
    )


def start(gemm: Any, schedule: int | None) -> None:
    if schedule is not None:
        gemm.core.set_options(capability=90, schedule=schedule, multiprocessors=2)


def finish(gemm: Any, op: str, size: tuple[int, int, int], schedule: int | None = None) -> None:
    """Fails for every report that emulator_allowed.toml does not allow at this size; on sm_90 none
    is, and the op's kernel of CUTLASS 3.x must have run."""
    if schedule is not None:
        assert gemm.core.reports() == []
        hopper = [
            kernel
            for kernel in gemm.core.ptx_kernels()
            if "MainloopSm90" in kernel and HOPPER_KERNELS[op] in kernel
        ]
        assert any(gemm.core.ptx_reached_lines(kernel) for kernel in hopper)
    reports = gemm.core.reports()
    gemm.core.clear_reports()
    assert [r for r in reports if not any(fits(e, r, op, size) for e in ALLOWED)] == []


@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "plain"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_bias(
    gemm: Any, shape: tuple[int, int, int], dtype: torch.dtype, with_bias: bool
) -> None:
    m, n, k = shape
    x, w, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1), randn(n, dtype=dtype)
    y = gemm.empty((m, n), dtype)
    gemm.core.linear_bias(gemm.put(x), gemm.put(w), gemm.put(bias) if with_bias else None, y)
    finish(gemm, "linear_bias", (m, n, k))
    want = x.double() @ w.double().t() + (bias.double() if with_bias else 0)
    check(gemm.get(y), want, x.double().abs() @ w.double().abs().t() + 1)


@pytest.mark.parametrize("schedule", [0, 1, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize("shape", HOPPER_SHAPES, ids=str)
def test_linear_bias_on_sm90(
    gemm: Any, shape: tuple[int, int, int], dtype: torch.dtype, schedule: int
) -> None:
    """CUTLASS 3.x: TMA, mbarriers, warp-specialised wgmma."""
    start(gemm, schedule)
    m, n, k = shape
    x, w, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1), randn(n, dtype=dtype)
    y = gemm.empty((m, n), dtype)
    gemm.core.linear_bias(gemm.put(x), gemm.put(w), gemm.put(bias), y)
    finish(gemm, "linear_bias", shape, schedule)
    want = x.double() @ w.double().t() + bias.double()
    check(gemm.get(y), want, x.double().abs() @ w.double().abs().t() + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_linear_bias_gelu(gemm: Any, case: Case, dtype: torch.dtype) -> None:
    (m, n, k), schedule = case
    start(gemm, schedule)
    x, w, bias = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype, seed=1), randn(n, dtype=dtype)
    y, pre = gemm.empty((m, n), dtype), gemm.empty((m, n), dtype)
    gemm.core.linear_bias_gelu(gemm.put(x), gemm.put(w), gemm.put(bias), y, pre)
    finish(gemm, "linear_bias_gelu", (m, n, k), schedule)
    want = x.double() @ w.double().t() + bias.double()
    terms = x.double().abs() @ w.double().abs().t() + 1
    check(gemm.get(pre), want, terms)
    check(gemm.get(y), torch.nn.functional.gelu(want, approximate="tanh"), 2 * terms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize("case", CASES)
def test_linear_swiglu(gemm: Any, case: Case, dtype: torch.dtype) -> None:
    (m, n, k), schedule = case
    start(gemm, schedule)
    x = randn(m, k, dtype=dtype)
    wg, wu = (randn(n, k, dtype=dtype, seed=s) * k**-0.5 for s in (1, 2))
    gate, up, y = (gemm.empty((m, n), dtype) for _ in range(3))
    gemm.core.linear_swiglu(gemm.put(x), gemm.put(wg), gemm.put(wu), gate, up, y)
    finish(gemm, "linear_swiglu", (m, n, k), schedule)
    for got, w in ((gate, wg), (up, wu)):
        check(gemm.get(got), x.double() @ w.double().t(), x.double().abs() @ w.double().abs().t())
    stored = [gemm.get(t).double() for t in (gate, up)]
    want = torch.nn.functional.silu(stored[0]) * stored[1]
    check(gemm.get(y), want, want.abs() + 1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
@pytest.mark.parametrize(
    "case", [*CASES, pytest.param(((392, 136, 72), 2), id="sm90-deeper-than-the-pipeline")]
)
def test_linear_weight_grad(gemm: Any, case: Case, dtype: torch.dtype) -> None:
    (m, n, k), schedule = case
    start(gemm, schedule)
    dy, x = randn(m, n, dtype=dtype), randn(m, k, dtype=dtype, seed=1)
    before = randn(n, k, dtype=torch.float32)
    dw = gemm.put(before)
    gemm.core.linear_weight_grad(gemm.put(dy), gemm.put(x), dw)
    finish(gemm, "linear_weight_grad", (n, k, m), schedule)
    terms = dy.double().abs().t() @ x.double().abs() + 1
    check(gemm.get(dw), before.double() + dy.double().t() @ x.double(), terms)


@pytest.mark.parametrize(
    "schedule", [None, 0, 1, 5], ids=lambda s: "sm80" if s is None else f"sm90-{s}"
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str, indirect=True)
def test_grouped_linear(gemm: Any, dtype: torch.dtype, schedule: int | None) -> None:
    """Groups of many tokens, of one and of none; on sm_90 a block's tiles are of several groups."""
    start(gemm, schedule)
    sizes = (70, 0, 1, 130, 3)
    m, n, k = sum(sizes), 72, 104
    x, w = randn(m, k, dtype=dtype), randn(len(sizes), n, k, dtype=dtype, seed=1)
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    y = gemm.empty((m, n), dtype)
    words = gemm.core.grouped_workspace_bytes(len(sizes)) // 8 + 1
    workspace = gemm.empty((words,), torch.int64)
    gemm.core.grouped_linear(gemm.put(x), gemm.put(w), gemm.put(offsets), y, workspace)
    finish(gemm, "grouped_linear", (m, n, k), schedule)
    got = gemm.get(y)
    for g in range(len(sizes)):
        rows = slice(int(offsets[g]), int(offsets[g + 1]))
        a, b = x[rows].double(), w[g].double().t()
        check(got[rows], a @ b, a.abs() @ b.abs())


def test_refuses(gemm: Any) -> None:
    x, w = (
        gemm.put(randn(4, 12, dtype=torch.bfloat16)),
        gemm.put(randn(8, 12, dtype=torch.bfloat16)),
    )
    y = gemm.empty((4, 8), torch.bfloat16)
    with pytest.raises(ValueError, match="k 12, both must be multiples of 8"):
        gemm.core.linear_bias(x, w, None, y)
    with pytest.raises(ValueError, match=r"y has shape \(4,8\), expected"):
        gemm.core.linear_bias(x, gemm.put(randn(16, 12, dtype=torch.bfloat16)), None, y)


@pytest.mark.parametrize("entry", ALLOWED, ids=lambda e: e["op"])
@pytest.mark.parametrize("size", [8, 128])
def test_every_allowance_is_used(gemm: Any, entry: dict[str, Any], size: int) -> None:
    """The report is made from that depth on; of a whole tile, at that depth alone."""
    first = entry["from"]
    for depth in (first - 32, first, first + 32):
        run_at_depth(gemm, entry["op"], depth, size)
        reports = gemm.core.reports()
        gemm.core.clear_reports()
        expected = depth == first if size == 128 else depth >= first
        assert bool(reports) is expected
        assert all(fits(entry, r, entry["op"], (size, size, depth)) for r in reports)


def run_at_depth(gemm: Any, op: str, depth: int, size: int) -> None:
    """The product of (size, depth) and (size, depth)."""
    dtype = torch.bfloat16
    if op == "linear_weight_grad":
        dy, x = (gemm.put(randn(depth, size, dtype=dtype)) for _ in range(2))
        gemm.core.linear_weight_grad(dy, x, gemm.put(torch.zeros(size, size)))
        return
    x, w, other = (gemm.put(randn(size, depth, dtype=dtype)) for _ in range(3))
    bias = gemm.put(randn(size, dtype=dtype))
    y, gate, up = (gemm.empty((size, size), dtype) for _ in range(3))
    if op == "linear_bias":
        gemm.core.linear_bias(x, w, bias, y)
    elif op == "linear_bias_gelu":
        gemm.core.linear_bias_gelu(x, w, bias, y, gate)
    elif op == "linear_swiglu":
        gemm.core.linear_swiglu(x, w, other, gate, up, y)
    else:
        experts = gemm.put(randn(1, size, depth, dtype=dtype))
        words = gemm.core.grouped_workspace_bytes(1) // 8 + 1
        workspace = gemm.empty((words,), torch.int64)
        gemm.core.grouped_linear(x, experts, gemm.put(torch.tensor([0, size])), y, workspace)
