"""The core's products and causal attention on a CPU against torch's, at the shapes of training.

    python benchmarks/ops/bench_matmul.py [--threads 2] [--seconds 0.3]

Each line: GFLOP/s of ours and of torch's, best of several calls in turns, and torch's time over
ours. The products are those of bench_step.py's model (2,048 tokens, hidden 512, gated units 1,376
wide) and of its head, 512 tokens at a time: x wᵀ, dy w, and dyᵀ x added up. Attention counts half
of the pairs, forward, and forward with backward.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch  # first, so that fastllm_core shares its OpenMP threads
import torch.nn.functional as F

from fastllm_core import _core
from fastllm_train.ops.attention import causal_attention
from fastllm_train.ops.registration import capsule

Call = Callable[[], object]


def best_of(calls: tuple[Call, Call], seconds: float) -> list[float]:
    """Seconds of each, called in turns."""
    best = [float("inf"), float("inf")]
    for call in calls:
        call()
    end = time.perf_counter() + 2 * seconds
    while time.perf_counter() < end:
        for i, call in enumerate(calls):
            start = time.perf_counter()
            call()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def report(name: str, flops: float, ours: Call, torchs: Call, seconds: float) -> None:
    mine, theirs = best_of((ours, torchs), seconds)
    print(
        f"{name:<34}{flops / mine / 1e9:>8.0f}{flops / theirs / 1e9:>8.0f}{theirs / mine:>7.2f}",
        flush=True,
    )


def products(name: str, tokens: int, inputs: int, outputs: int, seconds: float) -> None:
    x, w = torch.randn(tokens, inputs), torch.randn(outputs, inputs)
    y, dx, dw = torch.randn(tokens, outputs), torch.empty_like(x), torch.zeros_like(w)
    flops = 2.0 * tokens * inputs * outputs

    def ours(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, accumulate: bool) -> Call:
        return lambda: _core.matmul(capsule(a), capsule(b), capsule(c), accumulate)

    at = f"{name} {tokens} x {inputs} x {outputs}"
    report(f"{at} y", flops, ours(x, w.t(), y, False), lambda: torch.mm(x, w.t(), out=y), seconds)
    report(f"{at} dx", flops, ours(y, w, dx, False), lambda: torch.mm(y, w, out=dx), seconds)
    report(f"{at} dw", flops, ours(y.t(), x, dw, True), lambda: dw.addmm_(y.t(), x), seconds)


def attention(length: int, dtype: torch.dtype, seconds: float) -> None:
    shape = (2048 // length, length, 8, 64)
    q, k, v = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(3))
    dout = torch.randn(shape).to(dtype)
    flops = 2.0 * shape[0] * 8 * length * length * 64

    def sdpa() -> torch.Tensor:
        query, key, value = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    def ours() -> torch.Tensor:
        return causal_attention(q, k, v)

    def trained(function: Callable[[], torch.Tensor]) -> Call:
        return lambda: torch.autograd.grad(function(), (q, k, v), dout)

    name = f"attention {length} {str(dtype).removeprefix('torch.')}"
    report(name, flops, ours, sdpa, seconds)
    report(f"{name} fwd+bwd", 3.5 * flops, trained(ours), trained(sdpa), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"core: {_core.cpu_isa()}, taken for products: {_core.matmul_pays()}")
    print(f"{'GFLOP/s':<34}{'ours':>8}{'torch':>8}{'ratio':>7}")
    products("linear", 2048, 512, 512, args.seconds)
    products("linear", 2048, 512, 1376, args.seconds)
    products("linear", 2048, 1376, 512, args.seconds)
    products("head", 512, 512, 32_000, args.seconds)
    for dtype in (torch.float32, torch.bfloat16):
        for length in (512, 2048):
            attention(length, dtype, args.seconds)


if __name__ == "__main__":
    main()
