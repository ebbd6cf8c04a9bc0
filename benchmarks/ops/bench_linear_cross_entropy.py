"""Peak memory and time of linear + cross entropy, forward and backward, against torch's two steps.

    python benchmarks/ops/bench_linear_cross_entropy.py [--tokens 2048] [--vocabulary 131072]

Each form runs in a process of its own; its memory is the growth of the peak resident size over what
was resident before the call, inputs included, and gradients are part of it.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from fastllm_train.ops.linear_cross_entropy import linear_cross_entropy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def loss_of(form: str, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> object:
    if form == "fastllm":
        losses = linear_cross_entropy(hidden, weight, labels)
    else:
        losses = F.cross_entropy((hidden @ weight.t()).float(), labels, reduction="none")
    losses.mean().backward()
    return losses


def measure(form: str, dtype: torch.dtype, tokens: int, size: int, vocabulary: int) -> None:
    hidden = torch.randn(tokens, size).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, size) * 0.02).to(dtype).requires_grad_()
    labels = torch.randint(0, vocabulary, (tokens,))
    loss_of(form, hidden[:8], weight[:512], labels[:8] % 512)  # loads what is loaded lazily
    hidden.grad = weight.grad = None
    before = resident_bytes()
    start = time.perf_counter()
    loss_of(form, hidden, weight, labels)
    seconds = time.perf_counter() - start
    print(peak_bytes() - before, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--form", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.form is not None:
        torch.set_num_threads(a.threads)
        return measure(a.form, DTYPES[a.dtype], a.tokens, a.size, a.vocabulary)
    print(f"{a.tokens} tokens, size {a.size}, vocabulary {a.vocabulary}, {a.threads} threads")
    for dtype in DTYPES:
        found: dict[str, tuple[float, float]] = {}
        for form in ("fastllm", "torch"):
            command = [sys.executable, *sys.argv, "--form", form, "--dtype", dtype]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak, seconds = map(float, done.stdout.split())
            found[form] = peak, seconds
        ours, theirs = found["fastllm"], found["torch"]
        print(
            f"{dtype}: {ours[0] / 2**20:.0f} MiB against {theirs[0] / 2**20:.0f} MiB of torch"
            f" ({ours[0] / theirs[0]:.2f}), {ours[1]:.2f} s against {theirs[1]:.2f} s"
        )


if __name__ == "__main__":
    main()
