"""What only a GPU shows: every kernel launched there, tensors past 2^31 elements, several streams.

The tests of each operator run on it too (the backend ``cuda``). FASTLLM_GPU_DEVICE=cpu runs the
same code on the CPU with small tensors, as CI does, so that none of it meets a GPU untried.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastllm_planner.arch import spec_from_dict
from fastllm_train.models.decoder import Decoder
from fastllm_train.models.initialise import initialise
from fastllm_train.models.kernels import FUSED
from fastllm_train.ops.adamw import adamw_
from fastllm_train.ops.bias_gelu import bias_gelu
from fastllm_train.ops.cross_entropy import cross_entropy
from fastllm_train.ops.glu import geglu, swiglu
from fastllm_train.ops.grad_norm import grad_norm
from fastllm_train.ops.layernorm import layernorm
from fastllm_train.ops.rmsnorm import rmsnorm
from fastllm_train.ops.rope import rope
from fastllm_train.ops.softmax import softmax

from .accuracy import DTYPES, ROUNDING

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks/ops"))

from cases import OPERATORS
from products import products

pytestmark = pytest.mark.gpu
STANDIN = os.environ.get("FASTLLM_GPU_DEVICE") == "cpu"


@pytest.fixture
def device(gpu_device: str) -> Iterator[str]:
    """``cuda``, or its stand-in; tensors are made there."""
    torch.set_default_device(gpu_device)
    yield gpu_device
    torch.set_default_device("cpu")


def finish() -> None:
    if not STANDIN:
        torch.cuda.synchronize()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(67, 136), (32, 1000), (16, 4100)], ids=str)
def test_every_kernel(device: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """What compute-sanitizer watches: values are compared elsewhere."""
    label = str(dtype)
    for operator in OPERATORS:
        for case in operator(*shape, label, dtype):
            case.kernel()
            case.operator()
            finish()


def test_every_product(device: str) -> None:
    for product in products(64, 128):
        got, expected = product.operator(), product.torch()
        assert isinstance(got, torch.Tensor)
        assert isinstance(expected, torch.Tensor)
        if product.operator_name == "linear_weight_grad":
            continue  # each adds to the same matrix; test_products compares
        torch.testing.assert_close(got.float(), expected.float(), rtol=2e-2, atol=2e-2)
    finish()


@pytest.mark.parametrize("depth", [8, 264, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products(device: str, dtype: torch.dtype, depth: int) -> None:
    from fastllm_train.ops.linear_bias import linear_bias
    from fastllm_train.ops.linear_weight_grad import linear_weight_grad_

    rows, cols = 333, 520
    x, w, bias = (torch.randn(s).to(dtype) for s in ((rows, depth), (cols, depth), (cols,)))
    want = x.double() @ w.double().t() + bias.double()
    terms = x.double().abs() @ w.double().abs().t() + bias.double().abs()
    error = (linear_bias(x, w, bias).double() - want).abs()
    assert (error <= want.abs() * ROUNDING[dtype] + terms * 4e-6).all()

    dy, before = torch.randn(rows, cols).to(dtype), torch.randn(cols, depth)
    grad = linear_weight_grad_(before.clone(), dy, x)
    want = before.double() + dy.double().t() @ x.double()
    terms = before.double().abs() + dy.double().abs().t() @ x.double().abs()
    assert ((grad.double() - want).abs() <= terms * 4e-6).all()


# --- past 2^31 elements ------------------------------------------------------------------------

# 2.15e9 elements in rows of 4,104; a stand-in's are few.
ROWS, COLS = (97, 136) if STANDIN else (2**19 + 3, 4104)
ROW_OPERATORS: dict[str, tuple[int, Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    # name: (tensors of the size, ours, in float64), of x and of one row of weights
    "rmsnorm": (
        2,
        lambda x, w: rmsnorm(x, w, 1e-6),
        lambda x, w: F.rms_norm(x, x.shape[1:], w, 1e-6),
    ),
    "layernorm": (
        2,
        lambda x, w: layernorm(x, w, None, 1e-5),
        lambda x, w: F.layer_norm(x, x.shape[1:], w, None, 1e-5),
    ),
    "bias_gelu": (2, bias_gelu, lambda x, w: F.gelu(x + w, approximate="tanh")),
    "softmax": (2, lambda x, w: softmax(x[None, None])[0, 0], lambda x, w: x.softmax(-1)),
    "swiglu": (2, lambda x, w: swiglu(x, x), lambda x, w: F.silu(x) * x),
    "geglu": (2, lambda x, w: geglu(x, x), lambda x, w: F.gelu(x, approximate="tanh") * x),
}  # fmt: skip


def require_memory(device: str, tensors: float, element_bytes: int = 2) -> None:
    needed = tensors * ROWS * COLS * element_bytes * 1.05
    if device == "cuda" and (free := torch.cuda.mem_get_info()[0]) < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory, {free / 2**30:.0f} are free")


def places(rows: int = ROWS, cols: int = COLS) -> list[int]:
    """Rows at both ends and where offsets pass 2^31."""
    around = 2**31 // cols
    return sorted({0, 1, rows // 3, min(around, rows - 2), min(around + 1, rows - 1), rows - 1})


def large() -> torch.Tensor:
    """bfloat16; the same few rows again and again would hide a wrong row."""
    x = torch.empty(ROWS, COLS, dtype=torch.bfloat16)
    return x.normal_()


@pytest.fixture
def emptied(device: str) -> Iterator[None]:
    yield
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.usefixtures("emptied")
@pytest.mark.parametrize("name", ROW_OPERATORS)
def test_past_31_bits(device: str, name: str) -> None:
    tensors, ours, reference = ROW_OPERATORS[name]
    require_memory(device, tensors)
    x, w = large(), torch.randn(COLS).bfloat16()
    y = ours(x, w)
    for row in places():
        want = reference(x[row : row + 1].double(), w.double())
        atol = 2**-9 * float(want.abs().max())
        torch.testing.assert_close(y[row : row + 1].double(), want, rtol=2**-7, atol=atol)


@pytest.mark.usefixtures("emptied")
def test_gradients_past_31_bits(device: str) -> None:
    require_memory(device, 4)
    x, w = large().requires_grad_(), torch.randn(COLS).bfloat16().requires_grad_()
    dy = torch.ones(COLS, dtype=torch.bfloat16).expand(ROWS, COLS).contiguous()
    dx, _ = torch.autograd.grad(rmsnorm(x, w, 1e-6), (x, w), dy)
    for row in places():
        row64 = x[row].detach().double().requires_grad_()
        y = F.rms_norm(row64, (COLS,), w.detach().double(), 1e-6)
        (want,) = torch.autograd.grad(y, row64, torch.ones(COLS, dtype=torch.float64))
        torch.testing.assert_close(dx[row].double(), want, rtol=2**-6, atol=2**-7)


@pytest.mark.usefixtures("emptied")
def test_losses_past_31_bits(device: str) -> None:
    require_memory(device, 2)
    logits, labels = large(), torch.randint(0, COLS, (ROWS,))
    losses = cross_entropy(logits, labels)
    for row in places():
        want = F.cross_entropy(logits[row].double()[None], labels[row][None])
        torch.testing.assert_close(losses[row].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("emptied")
def test_rotary_past_31_bits(device: str) -> None:
    require_memory(device, 2)
    head_dim = 8 if STANDIN else 108  # COLS in whole heads
    x = large().view(1, ROWS, -1, head_dim)
    angle = torch.rand(ROWS, head_dim // 2)
    y = rope(x, angle.cos(), angle.sin())
    for row in places():
        a, b = x[0, row].double().chunk(2, -1)
        cos, sin = angle[row].double().cos(), angle[row].double().sin()
        want = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        torch.testing.assert_close(y[0, row].double(), want, rtol=2**-7, atol=2**-7)


@pytest.mark.usefixtures("emptied")
def test_optimizer_past_31_bits(device: str) -> None:
    require_memory(device, 4, element_bytes=4)
    count = ROWS * COLS
    master, exp_avg, exp_avg_sq = torch.ones(count), torch.zeros(count), torch.zeros(count)
    grad = torch.empty(count, dtype=torch.bfloat16).normal_()
    adamw_(
        master, grad, exp_avg, exp_avg_sq, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0,
        step=1,
    )  # fmt: skip
    # The first step goes by lr, against the gradient's sign.
    for place in (0, count // 2, min(2**31, count - 2), count - 1):
        assert master[place].item() == pytest.approx(
            1.0 - 0.1 * grad[place].sign().item(), rel=1e-3
        )
    expected = sum(
        float(part.float().square().sum(dtype=torch.float64)) for part in grad.split(2**26)
    )
    assert float(grad_norm([grad])) == pytest.approx(expected**0.5, rel=1e-4)


# --- streams -----------------------------------------------------------------------------------


@contextlib.contextmanager
def on_stream(device: str) -> Iterator[None]:
    """Work in the block goes to a stream of its own, after what the current one has."""
    if device == "cpu":
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield


def test_streams_do_not_wait_for_each_other_wrongly(device: str) -> None:
    """A chain of operators on each of several streams, all in flight at once, gives the bits that
    one stream gives: a launch on another stream than its inputs' would read what is not there yet.
    """
    rows, cols = (97, 136) if STANDIN else (8192, 4096)

    def chain(x: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        leaf = x.clone().requires_grad_()
        y = rmsnorm(swiglu(leaf, bias_gelu(leaf, w)), w, 1e-6)
        losses = cross_entropy(layernorm(y, w), torch.arange(rows) % cols)
        (dx,) = torch.autograd.grad(losses.sum(), leaf)
        return [losses, softmax(dx[None, None])]

    inputs = [(torch.randn(rows, cols).bfloat16(), torch.randn(cols).bfloat16()) for _ in range(4)]
    expected = [chain(*pair) for pair in inputs]
    finish()
    results: list[list[torch.Tensor]] = []
    for pair in inputs:
        with on_stream(device):
            results.append(chain(*pair))
    finish()
    for got, want in zip(results, expected, strict=True):
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


# --- a training step ---------------------------------------------------------------------------

ARCH: dict[str, Any] = {
    "family": "llama", "layers": 2, "hidden": 128, "heads": 4, "kv_heads": 2, "head_dim": 32,
    "ffn_hidden": 256, "vocab": 512, "max_seq_len": 128,
}  # fmt: skip


def losses_of_steps(device: str, steps: int) -> list[float]:
    """Losses of a small model in float32, which AdamW of the native core trains on one batch."""
    spec = replace(spec_from_dict(ARCH))
    with torch.device("cpu"):  # the same weights and tokens on every device
        model = Decoder(spec, kernels=FUSED)
        initialise(model, spec, 1)
        tokens = torch.randint(spec.vocab, (2, 65), generator=torch.Generator().manual_seed(3))
    model.to(device)
    tokens = tokens.to(device)
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    positions = torch.arange(64, device=device).expand(2, -1)
    parameters = list(model.parameters())
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    losses: list[float] = []
    for step in range(1, steps + 1):
        loss = cross_entropy(model(inputs, positions).flatten(0, 1), labels.flatten()).mean()
        losses.append(loss.item())
        grads = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for p, grad, (m, v) in zip(parameters, grads, moments, strict=True):
                adamw_(
                    p, grad.contiguous(), m, v, lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
                    weight_decay=0.1, step=step,
                )  # fmt: skip
    return losses


def test_training_steps_equal_the_cpus(device: str) -> None:
    ours = losses_of_steps(device, 5)
    with torch.device("cpu"):
        expected = losses_of_steps("cpu", 5)
    assert expected[-1] < expected[0] - 0.1
    assert ours == pytest.approx(expected, rel=1e-4)
