"""What holds for every operator with gradients: they are those of the same function in plain torch
and float64, which passes gradcheck; and the same bits come out from run to run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fastllm_train.ops.adamw import adamw_
from fastllm_train.ops.attention import causal_attention
from fastllm_train.ops.bias_gelu import bias_gelu
from fastllm_train.ops.cross_entropy import cross_entropy
from fastllm_train.ops.glu import geglu, swiglu
from fastllm_train.ops.grad_norm import grad_norm
from fastllm_train.ops.layernorm import layernorm, layernorm_residual
from fastllm_train.ops.linear_cross_entropy import linear_cross_entropy
from fastllm_train.ops.moe_permute import moe_combine, moe_permute, moe_route
from fastllm_train.ops.rmsnorm import rmsnorm, rmsnorm_residual
from fastllm_train.ops.rope import rope
from fastllm_train.ops.softmax import softmax

from .accuracy import DTYPES, randoms

Tensors = tuple[torch.Tensor, ...]
EPS, SCALE, CHOICES = 1e-5, 0.37, 2
# Of the largest value: a few roundings, of the result and of what the backward pass keeps.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Op:
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: Callable[[int, int], tuple[tuple[int, ...], ...]]  # of the inputs, from rows and cols
    always_float32: tuple[int, ...] = ()  # inputs whose dtype is not the op's

    def inputs(self, rows: int, cols: int, dtype: torch.dtype) -> Tensors:
        tensors = randoms(*self.shapes(rows, cols), dtype=dtype)
        return tuple(
            t.float() if i in self.always_float32 and dtype != torch.float64 else t
            for i, t in enumerate(tensors)
        )


def matrices(count: int, vectors: int = 0) -> Callable[[int, int], tuple[tuple[int, ...], ...]]:
    return lambda rows, cols: ((rows, cols),) * count + ((cols,),) * vectors


def rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    n = (x - x.mean(-1, keepdim=True)) * (x.var(-1, unbiased=False, keepdim=True) + EPS).rsqrt()
    return n * weight + bias


def after_sum(norm: Callable[..., torch.Tensor]) -> Callable[..., Tensors]:
    def function(x: torch.Tensor, residual: torch.Tensor, *others: torch.Tensor) -> Tensors:
        h = x + residual
        return norm(h, *others), h

    return function


def gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def slopes_of(x: torch.Tensor) -> torch.Tensor:
    return 2.0 ** -torch.arange(1.0, x.shape[1] + 1)


def attention_mask(x: torch.Tensor) -> torch.Tensor:
    queries, keys = x.shape[-2:]
    return (torch.arange(keys) + 3 * torch.arange(queries)[:, None]).remainder(5)[None, None] < 3


def masked_softmax(x: torch.Tensor) -> torch.Tensor:
    queries, keys = x.shape[-2:]
    distance = torch.arange(keys) - torch.arange(queries)[:, None] - (keys - queries)
    here = attention_mask(x) & (distance <= 0)
    v = x * SCALE + slopes_of(x).to(x.dtype)[:, None, None] * distance
    return v.masked_fill(~here, -1e300).softmax(-1) * here


def rope_tables(x: torch.Tensor) -> Tensors:
    pairs = (x.shape[-1] + 2) // 4  # half of the channels turn
    angle = torch.arange(x.shape[1])[:, None] * 100.0 ** -(torch.arange(pairs) / pairs)
    return angle.cos(), angle.sin()


def rotary(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    cos, sin = (t.to(x.dtype)[None, :, None] for t in rope_tables(x))
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    layout = (-1, 2) if interleaved else (2, -1)
    a, b = turned.unflatten(-1, layout).unbind(-1 if interleaved else -2)
    both = torch.stack((a * cos - b * sin, b * cos + a * sin), -1 if interleaved else -2)
    return torch.cat((both.flatten(-2), rest), -1)


def labels_of(rows: int, cols: int) -> torch.Tensor:
    labels = torch.arange(rows) * 7919 % cols
    labels[rows // 2] = -100
    return labels


def losses(logits: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, labels_of(*logits.shape), reduction="none")


def slots_of(tokens: int) -> torch.Tensor:
    first = torch.arange(tokens) * 7 % 5
    slots = moe_route(torch.stack((first, (first + 1 + torch.arange(tokens)) % 5), 1), 5).slots
    slots[-1, 0] = -1  # dropped
    return slots


def permuted(x: torch.Tensor) -> torch.Tensor:
    """0 at the place of the dropped copy."""
    slots = slots_of(x.shape[0])
    tokens, choices = (slots >= 0).nonzero(as_tuple=True)
    return x.new_zeros(slots.numel(), x.shape[1]).index_copy(0, slots[tokens, choices], x[tokens])


def combined(y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    slots = slots_of(weights.shape[0])
    return ((weights * (slots >= 0))[:, :, None] * y[slots.clamp(min=0)]).sum(1)


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.einsum("bihd,bjd->bhij", q, k[:, :, 0]) * SCALE
    later = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return torch.einsum("bhij,bjd->bihd", scores.masked_fill(later, -1e300).softmax(-1), v[:, :, 0])


OPS = {
    "rmsnorm": Op(lambda x, w: rmsnorm(x, w, EPS), rms_norm, matrices(1, 1)),
    "rmsnorm_residual": Op(
        lambda x, r, w: rmsnorm_residual(x, r, w, EPS), after_sum(rms_norm), matrices(2, 1)
    ),
    "layernorm": Op(lambda x, w, b: layernorm(x, w, b, EPS), layer_norm, matrices(1, 2)),
    "layernorm_residual": Op(
        lambda x, r, w, b: layernorm_residual(x, r, w, b, EPS),
        after_sum(layer_norm),
        matrices(2, 2),
    ),
    "swiglu": Op(swiglu, lambda gate, up: gate * gate.sigmoid() * up, matrices(2)),
    "geglu": Op(geglu, lambda gate, up: gelu(gate) * up, matrices(2)),
    "bias_gelu": Op(bias_gelu, lambda x, bias: gelu(x + bias), matrices(1, 1)),
    "softmax": Op(
        lambda x: softmax(x, scale=SCALE, causal=True, mask=attention_mask(x), slopes=slopes_of(x)),
        masked_softmax,
        lambda rows, cols: ((1, 2, rows, cols),),
    ),
    "attention": Op(
        lambda q, k, v: causal_attention(q, k, v, scale=SCALE),
        causal,
        lambda rows, cols: ((1, rows, 2, 16), (1, rows, 1, 16), (1, rows, 1, 16)),
    ),
    "rope": Op(
        lambda x: rope(x, *rope_tables(x)),
        lambda x: rotary(x, interleaved=False),
        lambda rows, cols: ((1, rows, 2, 2 * cols),),
    ),
    "rope_interleaved": Op(
        lambda x: rope(x, *rope_tables(x), interleaved=True),
        lambda x: rotary(x, interleaved=True),
        lambda rows, cols: ((1, rows, 2, 2 * cols),),
    ),
    "cross_entropy": Op(lambda x: cross_entropy(x, labels_of(*x.shape)), losses, matrices(1)),
    "linear_cross_entropy": Op(
        lambda h, w: linear_cross_entropy(
            h, w, labels_of(h.shape[0], w.shape[0]), chunk_bytes=1024
        ),
        lambda h, w: losses(h @ w.t()),
        lambda rows, cols: ((rows, 4), (cols, 4)),
    ),
    "moe_permute": Op(
        lambda x: moe_permute(x, slots_of(x.shape[0]), CHOICES * x.shape[0]), permuted, matrices(1)
    ),
    "moe_combine": Op(
        lambda y, weights: moe_combine(y, slots_of(weights.shape[0]), weights),
        combined,
        lambda rows, cols: ((CHOICES * rows, cols), (rows, CHOICES)),
        always_float32=(1,),
    ),
}


def outputs_and_gradients(function: Callable[..., Any], inputs: Tensors) -> Tensors:
    """Of the sum of the outputs with weights that the shapes determine."""
    leaves = tuple(t.detach().requires_grad_() for t in inputs)
    result: Any = function(*leaves)
    outputs: Tensors = result if isinstance(result, tuple) else (result,)
    ones = [r.to(o.dtype) for o, r in zip(outputs, cotangents(outputs), strict=True)]
    gradients = torch.autograd.grad(outputs, leaves, ones)
    return (*(o.detach() for o in outputs), *gradients)


def cotangents(outputs: Tensors) -> Tensors:
    # Exact in every dtype, so that both sides get the same.
    return tuple((torch.arange(o.numel()) % 7 - 3).view(o.shape) / 4 for o in outputs)


@pytest.mark.parametrize("name", OPS)
def test_reference_passes_gradcheck(name: str) -> None:
    op = OPS[name]
    inputs = tuple(t.requires_grad_() for t in op.inputs(4, 5, torch.float64))
    assert torch.autograd.gradcheck(op.reference, inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (2, 1025), (70, 24)], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_gradients(name: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    op = OPS[name]
    inputs = op.inputs(*shape, dtype)
    got = outputs_and_gradients(op.ours, inputs)
    want = outputs_and_gradients(op.reference, tuple(t.double() for t in inputs))
    for a, b in zip(got, want, strict=True):
        size = b.abs().max().item() if b.numel() else 0.0
        torch.testing.assert_close(a.double(), b, rtol=0, atol=TOLERANCE[dtype] * size + 1e-6)


# Torch's matrix product, which linear_cross_entropy is made of, depends on the threads.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in OPS if name != "linear_cross_entropy"])
def test_same_bits_for_any_number_of_threads(
    name: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    inputs = OPS[name].inputs(67, 1537, dtype)
    results: list[Tensors] = []
    for count in (1, 2, 2, 3):
        threads(count)
        results.append(outputs_and_gradients(OPS[name].ours, inputs))
    assert_same_bits(results)


def test_same_bits_of_linear_cross_entropy(threads: Callable[[int], None]) -> None:
    op = OPS["linear_cross_entropy"]
    for count in (1, 2):
        threads(count)
        inputs = op.inputs(67, 1537, torch.bfloat16)
        assert_same_bits([outputs_and_gradients(op.ours, inputs) for _ in range(3)])


def test_same_bits_of_the_optimizer(threads: Callable[[int], None]) -> None:
    (grad,) = randoms((300_000,), dtype=torch.bfloat16)
    results: list[Tensors] = []
    for count in (1, 2, 2, 3):
        threads(count)
        state = tuple(torch.full((grad.numel(),), 0.5) for _ in range(3))
        adamw_(
            state[0], grad, *state[1:],
            lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, step=3,
        )  # fmt: skip
        results.append((*state, grad_norm([grad, state[0]])))
    assert_same_bits(results)


def assert_same_bits(results: list[Tensors]) -> None:
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
