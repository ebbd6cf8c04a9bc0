"""Operators on the CPU against the machine's copy bandwidth, torch eager and torch.compile.

    python benchmarks/ops/bench_ops.py [--threads 2] [--rows 16384] [--cols 4096] [--filter bf16]
    python benchmarks/ops/bench_ops.py --kernels     # kernel and copy only: a minute
    python benchmarks/ops/bench_ops.py --compile --op softmax [--filter "softmax fwd"]
    python benchmarks/ops/bench_ops.py --calls       # microseconds of a call on tiny tensors

Columns: the kernel with its outputs allocated beforehand, as GB/s of the traffic that the formula
needs and as a share of what torch's copy of a float32 tensor moves; then the torch operator, which
allocates, against the same function of torch, and with --compile against torch.compile of that.
With one thread times are CPU time, which other processes disturb least; with more they are wall
time. Each figure is a median; the competitors, the copy among them, run in turns. malloc is told to
keep what is freed: fresh pages cost every competitor more than its arithmetic does, and how much
depends on the state of the machine's memory.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

import torch  # first, so that fastllm_core shares its OpenMP threads
from cases import OPERATORS, Case

from fastllm_core import _core

Operators = list[Callable[..., list[Case]]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


# glibc reads these when a process starts.
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 30),
}


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


def print_calls(operators: Operators, wanted: str) -> None:
    """Microseconds of a call of operator and of torch's form: the best of 7 means of 1000."""
    torch.set_num_threads(1)
    for operator in operators:
        for case in operator(4, 64, "fp32", torch.float32):
            if wanted not in case.name:
                continue
            taken = [best_mean(f) * 1e6 for f in (case.operator, case.torch)]
            print(f"{case.name:34s}{taken[0]:8.1f} us{taken[1]:10.1f} us torch")


def best_mean(function: Callable[[], object], calls: int = 1000) -> float:
    means: list[float] = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        means.append((time.perf_counter() - start) / calls)
    return min(means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--cols", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also torch.compile of torch's form")
    parser.add_argument("--kernels", action="store_true", help="only the kernels and the copy")
    parser.add_argument("--calls", action="store_true", help="time of a call, on 4 x 64 elements")
    parser.add_argument("--filter", default="", help="only cases whose name contains this")
    named = {operator.__name__.removesuffix("_cases"): operator for operator in OPERATORS}
    parser.add_argument("--op", nargs="+", choices=named, default=list(named), help="only these")
    arguments = parser.parse_args()
    operators = [named[name] for name in arguments.op]
    if not arguments.calls and not KEEP_MEMORY.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP_MEMORY})
    torch.set_num_threads(arguments.threads)
    if arguments.calls:
        return print_calls(operators, arguments.filter)
    clock = time.process_time if arguments.threads == 1 else time.perf_counter
    rows, cols, runs, threads = (arguments.rows, arguments.cols, arguments.runs, arguments.threads)
    source, target = torch.randn(rows, cols), torch.empty(rows, cols)
    print(f"{threads} threads, {_core.cpu_isa()}, {rows}x{cols}")
    names = [] if arguments.kernels else ["operator", "torch", "ratio"]
    names += ["compiled", "ratio"] if arguments.compile else []
    widths = {"ratio": 8}
    print(
        f"{'':34s}{'kernel':>11s}{'of copy':>9s}",
        *(f"{n:>{widths.get(n, 12)}s}" for n in names),
        sep="",
    )
    for operator in operators:
        for label, dtype in DTYPES.items():
            for case in operator(rows, cols, label, dtype):
                if arguments.filter not in case.name:
                    continue
                competitors = [case.kernel, lambda: target.copy_(source)]
                if not arguments.kernels:
                    competitors += [case.operator, case.torch]
                if arguments.compile:
                    torch.compiler.reset()
                    competitors.append(torch.compile(case.torch))
                kernel, copy, *others = medians(competitors, runs, clock)
                rate = case.moved_bytes / kernel
                of_copy = rate / (2 * source.nbytes / copy)
                print(
                    f"{case.name:34s}{rate / 1e9:6.1f} GB/s{of_copy:9.2f}" + columns(others),
                    flush=True,
                )


def columns(seconds: list[float]) -> str:
    """Of the operator, torch and torch.compile: milliseconds, and ratios to the operator."""
    if not seconds:
        return ""
    ours, *theirs = seconds
    digits = 1 if ours >= 0.01 else 3
    text = f"{ours * 1e3:9.{digits}f} ms"
    return text + "".join(f"{t * 1e3:9.{digits}f} ms{t / ours:7.2f}x" for t in theirs)


if __name__ == "__main__":
    main()
