"""Full training steps of one model in fastllm and in other trainers.

    python benchmarks/train/bench_step.py [--dtype bf16] [--rounds 3] [--only fastllm hf_compile]

Forward, backward, clipping and AdamW on the same random tokens: hidden 512, 8 layers, vocabulary
32,000, 4 sequences of 512. Every trainer runs in its own process, so that peak memory is its own,
and in interleaved rounds, so that other load on the machine falls on all of them; all with
transparent huge pages for tensors, as the launcher sets them. Printed: the median step over all
rounds and the spread of the rounds' medians, tokens/s, the share of the GEMM peak that the same run
measured (model FLOPs with causal attention), peak resident memory. A trainer that is not installed,
or fails, is named with the reason.

    pip install --no-deps litgpt lightning lightning-utilities torchmetrics jsonargparse \
        torchtitan==0.3.0 tyro spmd_types torchdata docstring_parser typeguard
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from models import ARCH, BUILDERS, EAGER, MICRO, SEQ_LEN, VOCAB, torch_dtype

WARM_UP, STEPS = 2, 4
TOKENS = MICRO * SEQ_LEN


def run_one(name: str, dtype: str, threads: int, steps: int) -> dict[str, Any]:
    """Time one trainer in this process."""
    import resource

    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    step = BUILDERS[name](dtype)
    torch.set_num_threads(threads)
    tokens = torch.randint(VOCAB, (MICRO, SEQ_LEN))
    times: list[float] = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        step(tokens)
        times.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"steps_s": times[WARM_UP:], "peak_gib": memory}


def measure_peak(dtype: str, threads: int) -> dict[str, Any]:
    import torch

    from fastllm_train.peak import gemm_tflops

    torch.set_num_threads(threads)
    return {"tflops": gemm_tflops(torch_dtype(dtype), torch.device("cpu"), seconds=1.0)}


def in_process(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """``run_one`` or the peak in a process of its own; ``reason`` if it failed."""
    command = [sys.executable, __file__, "--dtype", args.dtype, "--threads", str(args.threads)]
    env = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1", "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(
        [*command, "--steps", str(args.steps), "--in-process", name],
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"reason": lines[-1] if lines else f"status {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def table(results: dict[str, list[dict[str, Any]]], peak: float) -> str:
    from fastllm_planner.arch import spec_from_dict
    from fastllm_planner.flops import model_flops_per_token

    flops = model_flops_per_token(spec_from_dict(ARCH), SEQ_LEN, "causal")
    rows = [f"GEMM peak measured in this run: {peak * 1e3:.0f} GFLOP/s"]
    rows.append(f"{'trainer':<17}{'step s':>8}{'rounds':>15}{'tokens/s':>10}{'MFU':>7}{'GiB':>7}")
    for name, rounds in results.items():
        found = [r for r in rounds if "reason" not in r]
        if not found:
            rows.append(f"{name:<17}skipped: {rounds[0]['reason']}")
            continue
        step = statistics.median(s for r in found for s in r["steps_s"])
        medians = [statistics.median(r["steps_s"]) for r in found]
        spread = f"{min(medians):.2f}-{max(medians):.2f}"
        mfu = 100 * TOKENS / step * flops / 1e12 / peak
        memory = max(r["peak_gib"] for r in found)
        rows.append(
            f"{name:<17}{step:>8.3f}{spread:>15}{TOKENS / step:>10.0f}{mfu:>6.1f}%{memory:>7.2f}"
        )
    return "\n".join([*rows, *ratios(results)])


def ratios(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Against the fastest other trainer and the eager ones, round by round."""
    rows: list[str] = []
    rounds = [
        {name: rounds[i] for name, rounds in results.items() if "reason" not in rounds[i]}
        for i in range(min(map(len, results.values())))
    ]
    for name in ("fastllm", "fastllm_loop"):
        speeds, memories = [], []
        for found in rounds:
            others = {k: v for k, v in found.items() if not k.startswith("fastllm")}
            eager = [v["peak_gib"] for k, v in others.items() if k in EAGER]
            if name in found and others:
                fastest = min(statistics.median(v["steps_s"]) for v in others.values())
                speeds.append(fastest / statistics.median(found[name]["steps_s"]))
                if eager:
                    memories.append(found[name]["peak_gib"] / min(eager))
        if speeds:
            text = ", ".join(f"{x:.2f}" for x in speeds)
            rows.append(f"{name}: {text} times the fastest other trainer")
        if memories:
            rows.append(f"{name}: {max(memories):.2f} of the smallest eager trainer's memory")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", choices=tuple(BUILDERS), nargs="+", default=tuple(BUILDERS))
    parser.add_argument("--in-process", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_process == "peak":
        print(json.dumps(measure_peak(args.dtype, args.threads)))
        return
    if args.in_process:
        print(json.dumps(run_one(args.in_process, args.dtype, args.threads, args.steps)))
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only}
    peaks: list[float] = []
    for _ in range(args.rounds):
        peaks.append(in_process("peak", args)["tflops"])
        for name in args.only:
            results[name].append(in_process(name, args))
            print(name, results[name][-1], file=sys.stderr, flush=True)
    print(table(results, max(peaks)))


if __name__ == "__main__":
    main()
