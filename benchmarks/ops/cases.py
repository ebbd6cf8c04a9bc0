"""The operators that bench_ops.py measures, each beside the same function of torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch  # first, so that fastllm_core shares its OpenMP threads
import torch.nn.functional as F

from fastllm_core import _core
from fastllm_train.ops.adamw import adamw_, split_
from fastllm_train.ops.bias_gelu import bias_gelu
from fastllm_train.ops.cross_entropy import cross_entropy
from fastllm_train.ops.glu import geglu, swiglu
from fastllm_train.ops.grad_norm import grad_norm
from fastllm_train.ops.layernorm import layernorm, layernorm_residual
from fastllm_train.ops.moe_permute import moe_combine, moe_permute, moe_route
from fastllm_train.ops.registration import contiguous_capsule
from fastllm_train.ops.rmsnorm import rmsnorm, rmsnorm_residual
from fastllm_train.ops.rope import rope
from fastllm_train.ops.softmax import softmax

EPS = 1e-6


@dataclass
class Case:
    name: str
    moved_bytes: int  # by the kernel: inputs and outputs once each
    kernel: Callable[[], object]
    operator: Callable[[], object]
    torch: Callable[[], object]


def kernel_call(function: Callable[..., object], *arguments: object) -> Callable[[], object]:
    """The binding's call with tensors turned into capsules each time, as the operators do."""

    def call() -> object:
        return function(
            *(contiguous_capsule(a) if isinstance(a, torch.Tensor) else a for a in arguments)
        )

    return call


def parts(function: Callable[..., int], *sizes: int) -> int:
    """Parts of a two-stage sum on torch's default device, where the tensors are made."""
    return function(*sizes, cuda=torch.get_default_device().type == "cuda")


def rmsnorm_cases(rows: int, cols: int, label: str, dtype: torch.dtype) -> list[Case]:
    x, residual, dy, dh = (torch.randn(rows, cols).to(dtype) for _ in range(4))
    weight = torch.randn(cols).to(dtype)
    y, h = torch.empty_like(x), torch.empty_like(x)
    rstd, dweight = torch.empty(rows), torch.empty_like(weight)
    partial = torch.empty(parts(_core.rmsnorm_bwd_parts, rows, cols), cols)
    size = rows * cols * x.element_size()
    leaf, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()

    leaf_residual = residual.clone().requires_grad_()

    def trained(function: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), (leaf, leaf_weight), dy)

    def block(function: Callable[..., Any]) -> Callable[[], object]:
        leaves = (leaf, leaf_residual, leaf_weight)
        return lambda: torch.autograd.grad(function(), leaves, (dy, dh))

    def eager(x: Any, residual: Any, weight: Any) -> object:
        added = x + residual
        return F.rms_norm(added, (cols,), weight, EPS), added

    return [
        Case(
            f"rmsnorm fwd {label}",
            2 * size,
            kernel_call(_core.rmsnorm_fwd, x, None, weight, y, None, rstd, EPS),
            lambda: rmsnorm(x, weight, EPS),
            lambda: F.rms_norm(x, (cols,), weight, EPS),
        ),
        Case(
            f"rmsnorm residual fwd {label}",
            4 * size,
            kernel_call(_core.rmsnorm_fwd, x, residual, weight, y, h, rstd, EPS),
            lambda: rmsnorm_residual(x, residual, weight, EPS),
            lambda: eager(x, residual, weight),
        ),
        Case(
            f"rmsnorm bwd / fwd+bwd {label}",
            3 * size,
            kernel_call(_core.rmsnorm_bwd, dy, x, weight, rstd, None, y, dweight, partial),
            trained(lambda: rmsnorm(leaf, leaf_weight, EPS)),
            trained(lambda: F.rms_norm(leaf, (cols,), leaf_weight, EPS)),
        ),
        Case(
            f"rmsnorm residual bwd / fwd+bwd {label}",
            4 * size,
            kernel_call(_core.rmsnorm_bwd, dy, x, weight, rstd, dh, y, dweight, partial),
            block(lambda: rmsnorm_residual(leaf, leaf_residual, leaf_weight, EPS)),
            block(lambda: eager(leaf, leaf_residual, leaf_weight)),
        ),
    ]


def glu_cases(rows: int, cols: int, label: str, dtype: torch.dtype) -> list[Case]:
    gate, up, dy = (torch.randn(rows, cols).to(dtype) for _ in range(3))
    y, dgate = torch.empty_like(gate), torch.empty_like(gate)
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    cases: list[Case] = []
    functions: tuple[tuple[str, str, Callable[..., Any], Callable[..., Any]], ...] = (
        ("swiglu", "silu", swiglu, F.silu),
        ("geglu", "gelu", geglu, lambda g: F.gelu(g, approximate="tanh")),
    )
    for name, activation, ours, act in functions:
        cases += [
            Case(
                f"{name} fwd {label}",
                3 * gate.nbytes,
                kernel_call(_core.glu_fwd, gate, up, y, activation),
                lambda ours=ours: ours(gate, up),
                lambda act=act: act(gate) * up,
            ),
            Case(
                f"{name} bwd / fwd+bwd {label}",
                5 * gate.nbytes,
                kernel_call(_core.glu_bwd, dy, gate, up, y, dgate, activation),
                lambda ours=ours: torch.autograd.grad(ours(*leaves), leaves, dy),
                lambda act=act: torch.autograd.grad(act(leaves[0]) * leaves[1], leaves, dy),
            ),
        ]
    return cases


def rope_cases(rows: int, cols: int, label: str, dtype: torch.dtype) -> list[Case]:
    head_dim = min(128, cols)
    x = torch.randn(1, rows, cols // head_dim, head_dim).to(dtype)
    y = torch.empty_like(x)
    angle = torch.rand(rows, head_dim // 2) * 6.0
    cos, sin = angle.cos(), angle.sin()
    wide_cos, wide_sin = (torch.cat((t, t), -1)[None, :, None].to(dtype) for t in (cos, sin))

    def eager() -> object:
        first, second = x.chunk(2, dim=-1)
        return x * wide_cos + torch.cat((-second, first), dim=-1) * wide_sin

    return [
        Case(
            f"rope {label}",
            2 * x.nbytes,
            kernel_call(_core.rope, x, cos, sin, None, y, False, False),
            lambda: rope(x, cos, sin),
            eager,
        ),
        Case(
            f"rope interleaved {label}",
            2 * x.nbytes,
            kernel_call(_core.rope, x, cos, sin, None, y, True, False),
            lambda: rope(x, cos, sin, interleaved=True),
            eager,
        ),
    ]


def cross_entropy_cases(rows: int, cols: int, label: str, dtype: torch.dtype) -> list[Case]:
    vocabulary = min(32768, rows * cols // 4)
    rows = rows * cols // vocabulary
    logits = torch.randn(rows, vocabulary).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,))
    out = torch.empty_like(logits)
    outputs = [torch.empty(rows) for _ in range(3)]
    lse, dloss = logits.float().logsumexp(1), torch.ones(rows)
    leaf = logits.clone().requires_grad_()

    def eager(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x.float(), labels, reduction="none")

    return [
        Case(
            f"cross_entropy fwd {label}",
            logits.nbytes,
            kernel_call(_core.cross_entropy_fwd, logits, labels, *outputs),
            lambda: cross_entropy(logits, labels),
            lambda: eager(logits),
        ),
        Case(
            f"cross_entropy bwd / fwd+bwd {label}",
            2 * logits.nbytes,
            kernel_call(_core.cross_entropy_bwd, logits, labels, lse, dloss, out),
            lambda: torch.autograd.grad(cross_entropy(leaf, labels).sum(), leaf),
            lambda: torch.autograd.grad(eager(leaf).sum(), leaf),
        ),
    ]


def adamw_cases(rows: int, cols: int, label: str, dtype: torch.dtype) -> list[Case]:
    count = rows * cols
    master, exp_avg, exp_avg_sq = torch.randn(count), torch.zeros(count), torch.zeros(count)
    grad = torch.randn(count).to(dtype)
    model = None if dtype == torch.float32 else torch.empty(count, dtype=dtype)
    theirs = torch.nn.Parameter(master.clone())
    theirs.grad = grad.float()
    optimizer = torch.optim.AdamW([theirs], lr=1e-3, fused=True)
    numbers = (1e-3, 0.9, 0.999, 1e-8, 0.01, 1)
    half = 0 if model is None else model.nbytes

    def fused_and_cast() -> None:
        optimizer.step()
        if model is not None:
            model.copy_(theirs.detach())

    cases = [
        Case(
            f"adamw, {label} gradient and copy" if half else f"adamw {label}",
            6 * master.nbytes + grad.nbytes + half,
            kernel_call(_core.adamw, master, grad, exp_avg, exp_avg_sq, model, None, *numbers),
            lambda: adamw_(
                master, grad, exp_avg, exp_avg_sq, lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
                weight_decay=0.01, step=1, model=model,
            ),
            fused_and_cast,
        )
    ]  # fmt: skip
    if dtype == torch.bfloat16:
        upper, lower = torch.empty(count, dtype=dtype), torch.empty(count, dtype=torch.int16)
        split_(master, upper, lower)
        cases.append(
            Case(
                f"adamw, {label}, masters in halves",
                4 * master.nbytes + 2 * (upper.nbytes + lower.nbytes) + grad.nbytes,
                kernel_call(_core.adamw, lower, grad, exp_avg, exp_avg_sq, upper, None, *numbers),
                lambda: adamw_(
                    lower, grad, exp_avg, exp_avg_sq, lr=1e-3, betas=(0.9, 0.999), eps=1e-8,
                    weight_decay=0.01, step=1, model=upper,
                ),
                fused_and_cast,
            )
        )  # fmt: skip
    return cases


def layernorm_cases(rows: int, cols: int, label: str, dtype: torch.dtype) -> list[Case]:
    x, residual, dy, dh = (torch.randn(rows, cols).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(cols).to(dtype) for _ in range(2))
    y, h = torch.empty_like(x), torch.empty_like(x)
    mean, rstd, dweight = torch.empty(rows), torch.empty(rows), torch.empty_like(weight)
    dbias = torch.empty_like(weight)
    partial = torch.empty(2, parts(_core.layernorm_bwd_parts, rows, cols), cols)
    leaf, leaf_weight, leaf_bias = leaves = tuple(
        t.clone().requires_grad_() for t in (x, weight, bias)
    )
    leaf_residual = residual.clone().requires_grad_()
    fwd, bwd = _core.layernorm_fwd, _core.layernorm_bwd

    def block(function: Callable[..., Any]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), (*leaves, leaf_residual), (dy, dh))

    def eager(x: Any, residual: Any, weight: Any, bias: Any) -> object:
        added = x + residual
        return F.layer_norm(added, (cols,), weight, bias, EPS), added

    return [
        Case(
            f"layernorm fwd {label}",
            2 * x.nbytes,
            kernel_call(fwd, x, None, weight, bias, y, None, mean, rstd, EPS),
            lambda: layernorm(x, weight, bias, EPS),
            lambda: F.layer_norm(x, (cols,), weight, bias, EPS),
        ),
        Case(
            f"layernorm residual fwd {label}",
            4 * x.nbytes,
            kernel_call(fwd, x, residual, weight, bias, y, h, mean, rstd, EPS),
            lambda: layernorm_residual(x, residual, weight, bias, EPS),
            lambda: eager(x, residual, weight, bias),
        ),
        Case(
            f"layernorm bwd / fwd+bwd {label}",
            3 * x.nbytes,
            kernel_call(bwd, dy, x, weight, mean, rstd, None, y, dweight, dbias, partial),
            lambda: torch.autograd.grad(layernorm(leaf, leaf_weight, leaf_bias, EPS), leaves, dy),
            lambda: torch.autograd.grad(
                F.layer_norm(leaf, (cols,), leaf_weight, leaf_bias, EPS), leaves, dy
            ),
        ),
        Case(
            f"layernorm residual bwd / fwd+bwd {label}",
            4 * x.nbytes,
            kernel_call(bwd, dy, x, weight, mean, rstd, dh, y, dweight, dbias, partial),
            block(lambda: layernorm_residual(leaf, leaf_residual, leaf_weight, leaf_bias, EPS)),
            block(lambda: eager(leaf, leaf_residual, leaf_weight, leaf_bias)),
        ),
    ]


def bias_gelu_cases(rows: int, cols: int, label: str, dtype: torch.dtype) -> list[Case]:
    x, dy = (torch.randn(rows, cols).to(dtype) for _ in range(2))
    bias = torch.randn(cols).to(dtype)
    y, dbias = torch.empty_like(x), torch.empty_like(bias)
    partial = torch.empty(parts(_core.bias_gelu_bwd_parts, rows, cols), cols)
    leaf, leaf_bias = leaves = tuple(t.clone().requires_grad_() for t in (x, bias))

    def eager(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return F.gelu(x + bias, approximate="tanh")

    return [
        Case(
            f"bias_gelu fwd {label}",
            2 * x.nbytes,
            kernel_call(_core.bias_gelu_fwd, x, bias, y),
            lambda: bias_gelu(x, bias),
            lambda: eager(x, bias),
        ),
        Case(
            f"bias_gelu bwd / fwd+bwd {label}",
            3 * x.nbytes,
            kernel_call(_core.bias_gelu_bwd, dy, x, bias, y, dbias, partial),
            lambda: torch.autograd.grad(bias_gelu(leaf, leaf_bias), leaves, dy),
            lambda: torch.autograd.grad(eager(leaf, leaf_bias), leaves, dy),
        ),
    ]


def softmax_cases(rows: int, cols: int, label: str, dtype: torch.dtype) -> list[Case]:
    queries = min(cols, rows)
    x, dy = (torch.randn(1, rows // queries, queries, cols).to(dtype) for _ in range(2))
    out = torch.empty_like(x)
    y = x.softmax(-1)
    leaf = x.clone().requires_grad_()
    hidden = torch.ones(queries, cols, dtype=torch.bool).triu(1 + cols - queries)

    def causal(t: torch.Tensor) -> torch.Tensor:
        return (t * 0.1).masked_fill(hidden, -torch.inf).softmax(-1)

    return [
        Case(
            f"softmax fwd {label}",
            2 * x.nbytes,
            kernel_call(_core.softmax_fwd, x, None, None, out, 0.1, False),
            lambda: softmax(x, scale=0.1),
            lambda: (x * 0.1).softmax(-1),
        ),
        Case(
            f"softmax causal fwd {label}",
            x.nbytes + x.nbytes // 2,
            kernel_call(_core.softmax_fwd, x, None, None, out, 0.1, True),
            lambda: softmax(x, scale=0.1, causal=True),
            lambda: causal(x),
        ),
        Case(
            f"softmax bwd / fwd+bwd {label}",
            3 * x.nbytes,
            kernel_call(_core.softmax_bwd, dy, y, out, 0.1, False),
            lambda: torch.autograd.grad(softmax(leaf, scale=0.1), leaf, dy),
            lambda: torch.autograd.grad((leaf * 0.1).softmax(-1), leaf, dy),
        ),
    ]


def grad_norm_cases(rows: int, cols: int, label: str, dtype: torch.dtype) -> list[Case]:
    x = torch.randn(rows, cols).to(dtype)
    partial = torch.empty(parts(_core.squared_sum_parts, x.numel()))
    return [
        Case(
            f"grad_norm {label}",
            x.nbytes,
            kernel_call(_core.squared_sum, x, partial),
            lambda: grad_norm([x]),
            lambda: torch.linalg.vector_norm(x, dtype=torch.float32),
        )
    ]


def moe_permute_cases(rows: int, cols: int, label: str, dtype: torch.dtype) -> list[Case]:
    tokens = rows // 2
    x = torch.randn(tokens, cols).to(dtype)
    experts = torch.randint(0, 8, (tokens, 2))
    route = moe_route(experts, 8)
    weights = torch.rand(tokens, 2)
    source = route.slots.flatten().argsort() // 2
    y = torch.empty(rows, cols, dtype=dtype)
    out = torch.empty_like(x)

    def eager_combine() -> object:
        return (y[route.slots] * weights[:, :, None].to(dtype)).sum(1)

    return [
        Case(
            f"moe_permute {label}",
            x.nbytes + y.nbytes,
            kernel_call(_core.moe_permute, route.slots, x, y),
            lambda: moe_permute(x, route.slots, rows),
            lambda: x.index_select(0, source),
        ),
        Case(
            f"moe_combine {label}",
            x.nbytes + y.nbytes,
            kernel_call(_core.moe_combine, route.slots, weights, y, out),
            lambda: moe_combine(y, route.slots, weights),
            eager_combine,
        ),
    ]


OPERATORS = (
    rmsnorm_cases,
    layernorm_cases,
    glu_cases,
    bias_gelu_cases,
    softmax_cases,
    rope_cases,
    cross_entropy_cases,
    moe_permute_cases,
    grad_norm_cases,
    adamw_cases,
)
