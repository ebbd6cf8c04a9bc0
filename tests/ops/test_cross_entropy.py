"""Cross entropy on every backend against float64, and over a divided vocabulary."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn

from fastllm_core import _core
from fastllm_train.ops.cross_entropy import cross_entropy

from .accuracy import DENORMAL, DTYPES, ROUNDING, assert_within
from .random_inputs import CPU, RandomCase, random_cases

IGNORE = -100


def sample(
    rows: int, cols: int, dtype: torch.dtype, scale: float = 3.0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows * 65537 + cols)
    logits = (torch.randn(rows, cols, generator=generator) * scale).to(dtype)
    labels = torch.randint(0, cols, (rows,), generator=generator)
    if rows > 1:
        labels[1] = IGNORE
    return logits, labels, torch.randn(rows, generator=generator)


def fwd(
    backend: Any, logits: torch.Tensor, labels: torch.Tensor, first: int = 0, offset: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs = [backend.empty((logits.shape[0],), torch.float32) for _ in range(3)]
    backend.core.cross_entropy_fwd(
        backend.put(logits, offset), backend.put(labels), *outputs, first, IGNORE
    )
    backend.finish()
    largest, total, target = (backend.get(t) for t in outputs)
    return largest, total, target


def bwd(
    backend: Any,
    logits: torch.Tensor,
    labels: torch.Tensor,
    lse: torch.Tensor,
    dloss: torch.Tensor,
    first: int = 0,
    offset: int = 0,
) -> torch.Tensor:
    dlogits = backend.empty(tuple(logits.shape), logits.dtype, offset)
    on_device = [backend.put(t) for t in (logits, labels, lse, dloss)]
    backend.core.cross_entropy_bwd(*on_device, dlogits, first, IGNORE)
    backend.finish()
    return backend.get(dlogits)


def check(backend: Any, logits: torch.Tensor, labels: torch.Tensor, dloss: torch.Tensor) -> None:
    dtype = logits.dtype
    x = logits.double()
    largest, total, target = fwd(backend, logits, labels)
    used = labels != IGNORE
    column = torch.where(used, labels, 0)[:, None]
    assert torch.equal(largest, logits.float().amax(1))
    assert torch.equal(target, torch.where(used, logits.float().gather(1, column)[:, 0], 0.0))
    lse = x.logsumexp(1)
    # exp in float32: its argument's error, and 1.2 ulp per unit of it in CUDA's __expf.
    spread = (x - x.amax(1, keepdim=True)).abs()
    weights = torch.softmax(x, 1)
    relative = 4e-6 + (weights * spread).sum(1) * 4e-7
    assert ((largest.double() + total.double().log() - lse).abs() <= relative).all()

    dlogits = bwd(backend, logits, labels, lse.float(), dloss)
    one_hot = torch.zeros_like(x).scatter_(1, column, 1.0)
    expected = (weights - one_hot) * dloss.double()[:, None] * used[:, None]
    # The float32 lse has an absolute error of its rounding.
    error = 4e-6 + 4e-7 * (x - lse[:, None]).abs() + 2.0**-23 * lse[:, None].abs()
    bound = expected.abs() * ROUNDING[dtype] + DENORMAL[dtype]
    bound = bound + ((weights * error + one_hot * 2e-7) * dloss[:, None].abs() + 1e-37)
    assert_within(dlogits, expected, bound)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 1000), (5, 64), (2, 1), (4, 257), (33, 8), (1, 32000), (2, 8193)], ids=str
)
def test_values(backend: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    check(backend, *sample(*shape, dtype))


@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e4], ids=str)
def test_scales(backend: Any, scale: float) -> None:
    check(backend, *sample(4, 500, torch.float32, scale))


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    logits = case.tensor(case.rows, case.cols)
    labels = torch.arange(case.rows) * 7919 % case.cols
    if case.flag:
        labels[-1] = IGNORE
    dloss = case.normal(case.rows, index=1).float()
    check(CPU, logits, labels, dloss)

    bad = case.pick(case.rows)
    for value, total in ((-math.inf, 0.0), (math.nan, math.nan)):
        logits[bad] = -math.inf  # with nothing else, or with a NaN that must not hide behind it
        logits[bad, case.pick(case.cols)] = value
        before = fwd(CPU, logits, labels)
        torch.testing.assert_close(before[1][bad].item(), total, equal_nan=True)
        others = [row for row in range(case.rows) if row != bad]
        assert before[1][others].isfinite().all()


def test_masked_tokens(backend: Any) -> None:
    """-inf among finite logits has probability 0, wherever it stands."""
    logits, labels, dloss = sample(6, 9000, torch.float32)
    logits[0, :5000] = -math.inf
    logits[2, 10:] = -math.inf
    logits[3, ::2] = -math.inf
    labels = torch.tensor([6000, IGNORE, 3, 1, 4, 5])
    largest, total, _ = fwd(backend, logits, labels)
    lse = logits.double().logsumexp(1)
    torch.testing.assert_close(largest + total.log(), lse.float(), rtol=1e-6, atol=2e-6)
    dlogits = bwd(backend, logits, labels, lse.float(), dloss)
    assert (dlogits[logits == -math.inf] == 0).all()
    assert not dlogits.isnan().any()


@pytest.mark.parametrize("cols", [24, 5000])
def test_nothing_but_minus_infinity(backend: Any, cols: int) -> None:
    logits, labels, _ = sample(3, cols, torch.bfloat16)
    logits[2] = -math.inf
    largest, total, target = fwd(backend, logits, labels)
    assert (largest[2], total[2], target[2]) == (-math.inf, 0.0, -math.inf)
    assert total[:2].isfinite().all()


@pytest.mark.parametrize("place", [0, 5, 8200])
def test_nan_stays_in_its_row(backend: Any, place: int) -> None:
    logits, labels, dloss = sample(4, 8201, torch.bfloat16)
    logits[2] = -math.inf  # NaN must not hide behind these
    logits[2, place] = math.nan
    _, total, _ = fwd(backend, logits, labels)
    assert total.isnan().tolist() == [False, False, True, False]
    lse = logits.float().logsumexp(1)
    dlogits = bwd(backend, logits, labels, lse, dloss)
    assert dlogits[2].isnan().all()
    assert not dlogits[[0, 1, 3]].isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned(backend: Any, dtype: torch.dtype) -> None:
    logits, labels, dloss = sample(3, 128, dtype)
    lse = logits.float().logsumexp(1)
    for a, b in zip(
        fwd(backend, logits, labels, offset=1), fwd(backend, logits, labels), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=0)
    shifted = bwd(backend, logits, labels, lse, dloss, offset=1)
    assert torch.equal(shifted, bwd(backend, logits, labels, lse, dloss))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_in_place(backend: Any, dtype: torch.dtype) -> None:
    logits, labels, dloss = sample(5, 264, dtype)
    lse = logits.float().logsumexp(1)
    expected = bwd(backend, logits, labels, lse, dloss)
    on_device = [backend.put(t) for t in (logits, labels, lse, dloss)]
    backend.core.cross_entropy_bwd(*on_device, on_device[0], 0, IGNORE)
    backend.finish()
    assert torch.equal(backend.get(on_device[0]), expected)


def test_divided_vocabulary(backend: Any) -> None:
    """Two parts of the columns give the sums and gradients of the whole."""
    logits, labels, dloss = sample(7, 300, torch.float32)
    whole = fwd(backend, logits, labels)
    lse = logits.float().logsumexp(1)
    gradient = bwd(backend, logits, labels, lse, dloss)
    sums, targets, gradients = [], [], []
    for first, last in ((0, 110), (110, 300)):
        part = logits[:, first:last].contiguous()
        largest, total, target = fwd(backend, part, labels, first)
        sums.append(total * (largest - whole[0]).exp())
        targets.append(target)
        gradients.append(bwd(backend, part, labels, lse, dloss, first))
    torch.testing.assert_close(sums[0] + sums[1], whole[1], rtol=2e-6, atol=0)
    assert torch.equal(targets[0] + targets[1], whole[2])
    torch.testing.assert_close(torch.cat(gradients, 1), gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_pieces(backend: Any, dtype: torch.dtype) -> None:
    """Pieces of the columns one after the other, into the same sums."""
    logits, labels, _ = sample(7, 300, dtype)
    logits[2, :110] = -math.inf
    logits[3, 250] = math.nan
    outputs = [backend.empty((7,), torch.float32) for _ in range(3)]
    for first, last in ((0, 110), (110, 264), (264, 300)):
        part = logits[:, first:last].contiguous()
        on_device = backend.put(part), backend.put(labels)
        backend.core.cross_entropy_fwd(*on_device, *outputs, first, IGNORE, first > 0)
    backend.finish()
    got = [backend.get(t) for t in outputs]
    whole = fwd(backend, logits, labels)
    assert torch.equal(got[2], whole[2])
    finite = [0, 1, 2, 4, 5, 6]
    assert torch.equal(got[0][finite], whole[0][finite])
    torch.testing.assert_close(got[1], whole[1], rtol=4e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cols", [1, 40, 1000, 5000])
def test_loss(backend: Any, cols: int, dtype: torch.dtype) -> None:
    """The losses at once, where the vocabulary is not divided."""
    logits, labels, _ = sample(6, cols, dtype)
    labels[3], labels[4] = cols, -1
    lse, losses = (backend.empty((6,), torch.float32) for _ in range(2))
    backend.core.cross_entropy_loss(backend.put(logits), backend.put(labels), lse, losses, IGNORE)
    backend.finish()
    x = logits.double()
    expected = x.logsumexp(1)
    torch.testing.assert_close(backend.get(lse).double(), expected, rtol=1e-6, atol=4e-6)
    got = backend.get(losses)
    assert got[1] == 0
    assert got[3:5].isnan().all()
    for row in (0, 2, 5):
        want = expected[row] - x[row, labels[row]]
        torch.testing.assert_close(got[row].double(), want, rtol=1e-6, atol=4e-6)


def test_empty(backend: Any) -> None:
    logits, labels, dloss = sample(0, 16, torch.float32)
    assert fwd(backend, logits, labels)[0].shape == (0,)
    assert bwd(backend, logits, labels, dloss, dloss).shape == (0, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_moved(counted: Any, dtype: torch.dtype) -> None:
    """Each kernel reads the logits once; the gradient is written once."""
    logits, labels, dloss = sample(4, 4096, dtype)
    fwd(counted, logits, labels)
    c = counted.core.counters()
    per_row = 8 + logits.element_size()  # the label and its logit
    assert c["read_bytes"] <= logits.nbytes + 4 * per_row
    assert c["sectors"] <= 1.05 * c["min_sectors"]
    counted.core.clear_counters()
    bwd(counted, logits, labels, dloss, dloss)
    c = counted.core.counters()
    assert c["unique_read_bytes"] == logits.nbytes + 4 * (8 + 4 + 4)
    assert c["written_bytes"] == logits.nbytes


def test_binding_refuses() -> None:
    logits, labels, out = sample(4, 8, torch.float32)
    others = [torch.empty(4), torch.empty(4)]
    call: Any = _core.cross_entropy_fwd
    for arguments, message in (
        ((logits[0], labels, out, *others), "logits has not the shape"),
        ((logits, labels.int(), out, *others), "labels is not int64"),
        ((logits, labels[:3], out, *others), r"labels has shape \(3,\), expected \(4,\)"),
        ((logits, labels, out, out, others[0]), "sum overlaps max"),
        ((logits, labels, out.half(), *others), "max is float16, expected float32"),
    ):
        with pytest.raises(ValueError, match=f"cross_entropy_fwd: {message}"):
            call(*arguments)


# --- the torch function ------------------------------------------------------------------------


def test_opcheck() -> None:
    logits, labels, dloss = sample(5, 40, torch.float32)
    ops = torch.ops.fastllm
    torch.library.opcheck(ops.cross_entropy_fwd.default, (logits, labels, 0, IGNORE))
    leaf = logits.clone().requires_grad_()
    torch.library.opcheck(ops.cross_entropy_loss.default, (leaf, labels, IGNORE, False))
    arguments = (logits, labels, logits.logsumexp(1), dloss, 0, IGNORE)
    torch.library.opcheck(ops.cross_entropy_bwd.default, arguments)
    torch.library.opcheck(ops.cross_entropy_bwd_.default, arguments)


# Both are torch's own, while it compiles.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compiler", [None, "aot_eager"])
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "inplace"])
def test_against_torch(inplace: bool, compiler: str | None) -> None:
    logits, labels, weight = sample(12, 70, torch.float32)
    leaf = logits.view(3, 4, 70).requires_grad_()

    def function(x: torch.Tensor) -> torch.Tensor:
        # The product is a tensor of its own, which the gradient may overwrite.
        losses = cross_entropy(x * 1.5, labels.view(3, 4), inplace_backward=inplace)
        return (losses.flatten() * weight).sum()

    run = torch.compile(function, fullgraph=True, backend=compiler) if compiler else function
    loss = run(leaf)
    (got,) = torch.autograd.grad(loss, leaf)
    leaf64 = leaf.detach().double().requires_grad_()
    losses = F.cross_entropy(leaf64.flatten(0, 1) * 1.5, labels, reduction="none")
    expected = (losses * weight.double()).sum()
    (want,) = torch.autograd.grad(expected, leaf64)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-7)


def test_label_outside_of_the_vocabulary_is_nan() -> None:
    logits, _, _ = sample(3, 10, torch.float32)
    losses = cross_entropy(logits, torch.tensor([10, 2, -3]))
    assert losses.isnan().tolist() == [True, False, True]


def _rank(rank: int, address: Path, results: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    logits, labels, weight = sample(9, 60, torch.float32)
    logits[3, 25:] = -math.inf  # one rank has nothing for this row
    labels[3] = 4
    first, last = ((0, 25), (25, 60))[rank]
    part = logits[:, first:last].contiguous().requires_grad_()
    losses = cross_entropy(part, labels, first=first, group=dist.group.WORLD)
    (losses * weight).sum().backward()
    torch.save((losses.detach(), part.grad), results / f"{rank}.pt")
    dist.destroy_process_group()


def test_vocabulary_parallel(tmp_path: Path) -> None:
    spawn(_rank, args=(tmp_path / "address", tmp_path), nprocs=2)
    (losses, left), (other, right) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    logits, labels, weight = sample(9, 60, torch.float32)
    logits[3, 25:] = -math.inf
    labels[3] = 4
    whole = logits.double().requires_grad_()
    expected = F.cross_entropy(whole, labels, reduction="none")
    (expected * weight.double()).sum().backward()
    assert torch.equal(losses, other)
    torch.testing.assert_close(losses.double(), expected.detach(), rtol=1e-6, atol=1e-6)
    gradient = torch.cat((left, right), 1).double()
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-5, atol=1e-7)
