"""Operators on the CPU against the machine's copy bandwidth and torch eager, in one run.

    python benchmarks/ops/bench_ops.py [--threads 1] [--rows 16384] [--cols 4096] [--filter bf16]

Columns: the kernel with its outputs allocated beforehand, as GB/s of the traffic that the formula
needs and as a share of a plain copy measured in the same run; then the torch operator, which
allocates, against the same function of torch. With one thread times are CPU time, which other
processes disturb least; with more they are wall time. Each figure is a median; the competitors run
in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch  # first, so that fastllm_core shares its OpenMP threads
import torch.nn.functional as F

from fastllm_core import _core
from fastllm_train.ops.adamw import adamw_
from fastllm_train.ops.cross_entropy import cross_entropy
from fastllm_train.ops.glu import geglu, swiglu
from fastllm_train.ops.registration import contiguous_capsule
from fastllm_train.ops.rmsnorm import rmsnorm, rmsnorm_residual
from fastllm_train.ops.rope import rope

EPS = 1e-6
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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


def rmsnorm_cases(rows: int, cols: int, label: str, dtype: torch.dtype) -> list[Case]:
    x, residual, dy = (torch.randn(rows, cols).to(dtype) for _ in range(3))
    weight = torch.randn(cols).to(dtype)
    y, h = torch.empty_like(x), torch.empty_like(x)
    rstd, dweight = torch.empty(rows), torch.empty_like(weight)
    partial = torch.empty(_core.rmsnorm_bwd_parts(rows, cols), cols)
    size = rows * cols * x.element_size()
    leaf, leaf_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def trained(function: Callable[..., torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(function(), (leaf, leaf_weight), dy)

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
            lambda: F.rms_norm(x + residual, (cols,), weight, EPS),
        ),
        Case(
            f"rmsnorm bwd / fwd+bwd {label}",
            3 * size,
            kernel_call(_core.rmsnorm_bwd, dy, x, weight, rstd, None, y, dweight, partial),
            trained(lambda: rmsnorm(leaf, leaf_weight, EPS)),
            trained(lambda: F.rms_norm(leaf, (cols,), leaf_weight, EPS)),
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
    head_dim = 128
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
    vocabulary = 32768
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

    return [
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


OPERATORS = (rmsnorm_cases, glu_cases, rope_cases, cross_entropy_cases, adamw_cases)


def medians(
    functions: list[Callable[[], object]], runs: int, clock: Callable[[], float]
) -> list[float]:
    times: list[list[float]] = [[] for _ in functions]
    for run in range(runs + 1):
        for function, taken in zip(functions, times, strict=True):
            start = clock()
            function()
            if run:  # the first is for page faults and caches
                taken.append(clock() - start)
    return [statistics.median(taken) for taken in times]


def copy_bandwidth(rows: int, cols: int, runs: int, clock: Callable[[], float]) -> float:
    """Bytes read and written per second by torch's copy of a float32 tensor."""
    a, b = torch.randn(rows, cols), torch.empty(rows, cols)
    (seconds,) = medians([lambda: b.copy_(a)], runs, clock)
    return 2 * a.nbytes / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    rows, cols, runs, threads = (arguments.rows, arguments.cols, arguments.runs, arguments.threads)
    copy = copy_bandwidth(rows, cols, runs, clock)
    print(f"{threads} threads, {_core.cpu_isa()}, {rows}x{cols}, copy {copy / 1e9:.1f} GB/s")
    print(f"{'':34s}{'kernel':>11s}{'of copy':>9s}{'operator':>12s}{'torch':>12s}{'ratio':>8s}")
    for operator in OPERATORS:
        for label, dtype in DTYPES.items():
            for case in operator(rows, cols, label, dtype):
                if arguments.filter not in case.name:
                    continue
                competitors = [case.kernel, case.operator, case.torch]
                kernel, ours, theirs = medians(competitors, runs, clock)
                rate = case.moved_bytes / kernel
                print(
                    f"{case.name:34s}{rate / 1e9:6.1f} GB/s{rate / copy:9.2f}"
                    f"{ours * 1e3:9.1f} ms{theirs * 1e3:9.1f} ms{theirs / ours:7.1f}x"
                )


if __name__ == "__main__":
    main()
