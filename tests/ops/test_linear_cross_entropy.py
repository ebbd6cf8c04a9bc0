"""Linear layer and cross entropy without logits, against float64 with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.multiprocessing.spawn import spawn

from fastllm_train.ops.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_sum

from .accuracy import DTYPES, randoms
from .random_inputs import RandomCase, random_cases

TOKENS, SIZE, VOCABULARY = 11, 24, 1100
# At least 256 columns a piece: five pieces, the last of 76 columns.
CHUNK = 1
# Logits of the order of 5 are rounded to the dtype, and so are their gradients.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


PIECE = 4 * 4400  # of tokens: four rows of 1100 floats


PIECE = 4 * 4400  # of tokens: four rows of 1100 floats


def sample(
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight = randoms((TOKENS, SIZE), (VOCABULARY, SIZE), dtype=dtype)
    (share,) = randoms((TOKENS,), dtype=torch.float32)
    labels = torch.arange(TOKENS) * 107 % VOCABULARY
    labels[1] = -100
    labels[2] = VOCABULARY - 1
    return hidden, weight, labels, share


def expected(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, share: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    h, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    losses = F.cross_entropy(h @ w.t(), labels, reduction="none")
    dh, dw = torch.autograd.grad((losses * share.double()).sum(), (h, w))
    return losses.detach(), dh, dw


@pytest.mark.parametrize("chunk_bytes", [CHUNK, 64 << 20], ids=["pieces", "whole"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype: torch.dtype, chunk_bytes: int) -> None:
    hidden, weight, labels, share = sample(dtype)
    hidden.requires_grad_()
    weight.requires_grad_()
    losses = linear_cross_entropy(hidden, weight, labels, chunk_bytes=chunk_bytes)
    got = torch.autograd.grad((losses * share).sum(), (hidden, weight))
    want = expected(hidden, weight, labels, share)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(losses.double(), want[0], rtol=0, atol=tolerance)
    for a, b in zip(got, want[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * b.abs().max().item())
    assert losses[1] == 0
    assert not got[0][1].any()


@random_cases
def test_random_shapes(case: RandomCase) -> None:
    hidden = case.normal(case.rows, 16, index=0).requires_grad_()
    weight = case.normal(case.cols, 16, index=1).requires_grad_()
    labels = torch.arange(case.rows) * 7919 % case.cols
    share = case.normal(case.rows, index=2).float()
    losses = linear_cross_entropy(hidden, weight, labels, chunk_bytes=case.rows * case.cols)
    got = torch.autograd.grad((losses * share).sum(), (hidden, weight))
    want = expected(hidden, weight, labels, share)
    tolerance = TOLERANCE[case.dtype]
    torch.testing.assert_close(losses.double(), want[0], rtol=0, atol=4 * tolerance)
    for a, b in zip(got, want[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * b.abs().max().item())


def test_pieces_give_what_the_whole_gives() -> None:
    hidden, weight, labels, _ = sample(torch.bfloat16)
    whole = linear_cross_entropy(hidden, weight, labels)
    pieces = linear_cross_entropy(hidden, weight, labels, chunk_bytes=CHUNK)
    torch.testing.assert_close(pieces, whole, rtol=2e-6, atol=2e-6)


def test_one_gradient_is_enough() -> None:
    hidden, weight, labels, share = sample(torch.float32)
    want = expected(hidden, weight, labels, share)
    for index, leaf in enumerate((hidden, weight)):
        leaf.requires_grad_()
        losses = linear_cross_entropy(hidden, weight, labels, chunk_bytes=CHUNK)
        (got,) = torch.autograd.grad((losses * share).sum(), leaf)
        torch.testing.assert_close(got.double(), want[1 + index], rtol=1e-4, atol=1e-5)
        leaf.requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled() -> None:
    hidden, weight, labels, share = sample(torch.float32)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())

    def function(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (linear_cross_entropy(h, w, labels, chunk_bytes=CHUNK) * share).sum()

    run = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(run(*leaves), leaves),
        torch.autograd.grad(function(*leaves), leaves),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_opcheck() -> None:
    hidden, weight, labels, share = sample(torch.float32)
    ops = torch.ops.fastllm
    torch.library.opcheck(
        ops.linear_cross_entropy_fwd.default, (hidden, weight, labels, 0, -100, CHUNK)
    )
    lse = (hidden @ weight.t()).logsumexp(1)
    arguments = (hidden, weight, labels, lse, share, 0, -100, CHUNK, True, False)
    torch.library.opcheck(ops.linear_cross_entropy_bwd.default, arguments)


def test_refuses() -> None:
    hidden, weight, labels, _ = sample(torch.float32)
    with pytest.raises(ValueError, match=r"weight \(1100, 23\), expected"):
        linear_cross_entropy(hidden, weight[:, :23], labels)
    with pytest.raises(ValueError, match=r"weight is torch.bfloat16, expected torch.float32"):
        linear_cross_entropy(hidden, weight.bfloat16(), labels)
    with pytest.raises(ValueError, match=r"labels has shape \(10,\), expected \(11,\)"):
        linear_cross_entropy(hidden, weight, labels[:10])


def _rank(rank: int, address: Path, results: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=2)
    hidden, weight, labels, share = sample(torch.float32)
    first, last = ((0, 500), (500, VOCABULARY))[rank]
    leaves = (hidden.requires_grad_(), weight[first:last].clone().requires_grad_())
    losses = linear_cross_entropy(
        *leaves, labels, first=first, group=dist.group.WORLD, chunk_bytes=CHUNK
    )
    dhidden, dweight = torch.autograd.grad((losses * share).sum(), leaves)
    dist.all_reduce(dhidden)
    total = linear_cross_entropy_sum(
        *leaves, labels, share, first=first, group=dist.group.WORLD, chunk_bytes=PIECE
    )
    summed = torch.autograd.grad(total, leaves)
    dist.all_reduce(summed[0])
    torch.save((losses.detach(), dhidden, dweight, total.detach(), *summed), results / f"{rank}.pt")
    dist.destroy_process_group()


def test_vocabulary_parallel(tmp_path: Path) -> None:
    spawn(_rank, args=(tmp_path / "address", tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    losses, dhidden, dweight = expected(*sample(torch.float32))
    assert torch.equal(ranks[0][0], ranks[1][0])
    torch.testing.assert_close(ranks[0][0].double(), losses, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ranks[0][1].double(), dhidden, rtol=1e-4, atol=1e-5)
    got = torch.cat((ranks[0][2], ranks[1][2])).double()
    torch.testing.assert_close(got, dweight, rtol=1e-4, atol=1e-5)
    share = sample(torch.float32)[3].double()
    torch.testing.assert_close(ranks[0][3].double(), losses @ share, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(ranks[0][4].double(), dhidden, rtol=1e-4, atol=1e-5)
    got = torch.cat((ranks[0][5], ranks[1][5])).double()
    torch.testing.assert_close(got, dweight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("several", [True, False], ids=["pieces", "whole"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_against_float64(dtype: torch.dtype, several: bool) -> None:
    hidden, weight, labels, share = sample(dtype)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    total = linear_cross_entropy_sum(
        *leaves, labels, share, chunk_bytes=PIECE * dtype.itemsize // 4 if several else 1 << 20
    )
    got = torch.autograd.grad(total * 0.37, leaves)
    losses, *want = expected(hidden, weight, labels, share * 0.37)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}[dtype]
    assert abs(total.item() - (losses @ share.double()).item()) < 11 * tolerance
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=0, atol=tolerance * b.abs().max().item())
    assert not got[0][1].any()


def test_sum_of_pieces_in_bfloat16_rounds_the_weight_gradient_once() -> None:
    hidden, weight, labels, share = sample(torch.bfloat16)
    weight.requires_grad_()
    found: list[torch.Tensor] = []
    for chunk in (1, 1 << 20):  # eleven pieces, one
        total = linear_cross_entropy_sum(hidden, weight, labels, share, chunk_bytes=chunk)
        found.append(torch.autograd.grad(total, weight)[0].float())
    # Half a unit in the last place each, of products that were rounded to bfloat16 themselves.
    assert (found[0] - found[1]).abs().max() <= 2**-8 * found[1].abs().max()


def test_sum_makes_only_wanted_gradients_and_once() -> None:
    hidden, weight, labels, share = sample(torch.float32)
    want = expected(hidden, weight, labels, share)
    for index, leaf in enumerate((hidden, weight)):
        leaf.requires_grad_()
        total = linear_cross_entropy_sum(hidden, weight, labels, share)
        (got,) = torch.autograd.grad(total, leaf, retain_graph=True)
        torch.testing.assert_close(got.double(), want[1 + index], rtol=1e-4, atol=1e-5)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(total, leaf)
        leaf.requires_grad_(False)
    assert not linear_cross_entropy_sum(hidden, weight, labels, share).requires_grad
    with pytest.raises(ValueError, match=r"share has shape \(10,\), expected \(11,\)"):
        linear_cross_entropy_sum(hidden, weight, labels, share[:10])
