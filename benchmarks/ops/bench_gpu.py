"""Operators and matrix products on a GPU: GB/s and TFLOP/s, against ceilings and other libraries.

    python benchmarks/ops/bench_gpu.py [--filter rmsnorm] [--out benchmarks/ops/results/NAME.json]
    python benchmarks/ops/bench_gpu.py --device cpu    # the same code without a GPU, small tensors

Ceilings, measured first: torch's copy of 1 GiB of float32, its bfloat16 product of 8192 cubed.
Columns: the kernel with its outputs allocated beforehand, as GB/s of the traffic that the formula
needs and as a share of the copy; the operator's time; then how many times that torch eager,
torch.compile and, where they are installed, Liger and flash-attn take. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # first, so that fastllm_core shares its OpenMP threads
from cases import OPERATORS, Case
from peers import PEERS
from products import products

from fastllm_core import features

Function = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sizes:
    rows: int
    cols: int
    copied_bytes: int
    product: int  # n of the n x n x n product that is the ceiling
    seconds: float  # that a run takes at least
    runs: int
    compiler: str  # backend of torch.compile
    dtypes: tuple[str, ...]


FULL = Sizes(16384, 4096, 1 << 30, 8192, 0.02, 7, "inductor", tuple(DTYPES))
SMALL = Sizes(64, 256, 1 << 20, 64, 0.0, 1, "eager", ("bf16",))


class Clock:
    """Seconds of a call, by CUDA events on a GPU and by the wall clock elsewhere."""

    def __init__(self, device: str, sizes: Sizes) -> None:
        self.cuda = device == "cuda"
        self.sizes = sizes

    def once(self, function: Function, calls: int) -> float:
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(calls):
                function()
            return (time.perf_counter() - start) / calls
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls

    def seconds(self, function: Function) -> float:
        """The median of several runs, after two calls that compile, tune and allocate."""
        for _ in range(2):
            function()
        calls = max(1, int(self.sizes.seconds / max(self.once(function, 1), 1e-7)))
        return statistics.median(self.once(function, calls) for _ in range(self.sizes.runs))


def copy_rate(clock: Clock) -> float:
    """Bytes read and written per second by torch's copy."""
    source = torch.randn(clock.sizes.copied_bytes // 4)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.seconds(lambda: target.copy_(source))


def product_rate(clock: Clock) -> float:
    """FLOP per second of torch's square bfloat16 product."""
    n = clock.sizes.product
    a, b = (torch.randn(n, n).bfloat16() for _ in range(2))
    out = torch.empty(n, n, dtype=torch.bfloat16)
    return 2 * n**3 / clock.seconds(lambda: torch.mm(a, b, out=out))


def compiled(function: Function, backend: str) -> Function:
    torch.compiler.reset()
    return torch.compile(function, backend=backend)


def calls_of(library: str, rows: int, cols: int, dtype: torch.dtype) -> dict[str, Function]:
    """What a library offers, by the kind of case; nothing, with a note, if it fails on this GPU."""
    try:
        return PEERS[library](rows, cols, dtype)
    except Exception as error:
        print(f"note: {library} is left out: {type(error).__name__}: {error}", file=sys.stderr)
        return {}


def others_of(case: Case, label: str, peers: dict[str, dict[str, Function]]) -> dict[str, Function]:
    kind = case.name.removesuffix(f" {label}")
    return {name: calls[kind] for name, calls in peers.items() if kind in calls}


def ratio(clock: Clock, other: Function, ours: float) -> float | str:
    """Times of our operator that another library takes, or what it fails with: a library that does
    not run on this GPU is no reason to lose the other figures."""
    try:
        return round(clock.seconds(other) / ours, 3)
    except Exception as error:
        return f"fails ({type(error).__name__})"


def measure_operators(clock: Clock, copy: float, wanted: str, compile_too: bool) -> list[Any]:
    """One record a case, printed as it is measured."""
    records: list[Any] = []
    rows, cols = clock.sizes.rows, clock.sizes.cols
    print(f"{'':34s}{'kernel':>12s}{'of copy':>9s}{'operator':>12s}   others / operator")
    for label in clock.sizes.dtypes:
        dtype = DTYPES[label]
        peers = {name: calls_of(name, rows, cols, dtype) for name in PEERS}
        for operator in OPERATORS:
            for case in operator(rows, cols, label, dtype):
                if wanted not in case.name:
                    continue
                others = {"eager": case.torch}
                if compile_too:
                    others["compile"] = compiled(case.torch, clock.sizes.compiler)
                others |= others_of(case, label, peers)
                kernel, ours = clock.seconds(case.kernel), clock.seconds(case.operator)
                ratios = {name: ratio(clock, call, ours) for name, call in others.items()}
                rate = case.moved_bytes / kernel
                records.append(
                    {
                        "operator": operator.__name__.removesuffix("_cases"),
                        "case": case.name,
                        "gb_per_s": rate / 1e9,
                        "of_copy": rate / copy,
                        "operator_ms": ours * 1e3,
                        "others_over_operator": ratios,
                    }
                )
                shown = ", ".join(f"{name} {times}" for name, times in ratios.items())
                print(
                    f"{case.name:34s}{rate / 1e9:7.0f} GB/s{rate / copy:9.2f}"
                    f"{ours * 1e3:9.3f} ms   {shown}",
                    flush=True,
                )
    return records


def measure_products(clock: Clock, ceiling: float, wanted: str) -> list[Any]:
    """Matrix products of a layer of a 7B model: fastllm's against torch's steps."""
    records: list[Any] = []
    tokens, hidden = (clock.sizes.rows, clock.sizes.cols)
    for product in products(min(tokens, 8192), hidden):
        if wanted not in product.name:
            continue
        ours, theirs = clock.seconds(product.operator), clock.seconds(product.torch)
        rate = product.flops / ours
        records.append(
            {
                "operator": product.operator_name,
                "case": product.name,
                "tflop_per_s": rate / 1e12,
                "of_product": rate / ceiling,
                "operator_ms": ours * 1e3,
                "others_over_operator": {"eager": theirs / ours},
            }
        )
        print(
            f"{product.name:34s}{rate / 1e12:5.0f} TFLOP/s{rate / ceiling:9.2f}"
            f"{ours * 1e3:9.3f} ms   eager {theirs / ours:.2f}",
            flush=True,
        )
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and arguments.out is not None:
        print("error: --out is for a GPU's figures\nhint: leave it out", file=sys.stderr)
        return 2
    if arguments.device == "cuda" and not (torch.cuda.is_available() and features()["cuda"]):
        missing = "a GPU" if not torch.cuda.is_available() else "CUDA kernels in fastllm_core"
        print(
            f"error: there is no {missing}\nhint: --device cpu runs the same code", file=sys.stderr
        )
        return 2
    torch.set_default_device(arguments.device)
    if arguments.device == "cpu":
        torch.set_num_threads(1)  # small tensors: threads would mostly wait for each other
    clock = Clock(arguments.device, FULL if arguments.device == "cuda" else SMALL)
    name = torch.cuda.get_device_name() if clock.cuda else "cpu"
    copy, product = copy_rate(clock), product_rate(clock)
    print(f"{name}: copy {copy / 1e9:.0f} GB/s, bf16 product {product / 1e12:.1f} TFLOP/s")
    cases = measure_operators(clock, copy, arguments.filter, not arguments.no_compile)
    if clock.cuda and features()["cutlass_version"] is None:
        print("note: no products in this build (FASTLLM_CUTLASS)", file=sys.stderr)
    else:
        cases += measure_products(clock, product, arguments.filter)
    if arguments.out is not None:
        result = {
            "gpu": name,
            "torch": torch.__version__,
            "fastllm_core": features(),
            "copy_gb_per_s": copy / 1e9,
            "product_tflop_per_s": product / 1e12,
            "cases": cases,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
