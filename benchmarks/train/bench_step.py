"""Full training steps of the same model in fastllm's parts and in Hugging Face's.

    python benchmarks/train/bench_step.py [--dtype bf16] [--threads 2] [--rounds 3]

Every implementation runs forward, backward, clipping and fused AdamW on the same random tokens, in
its own process (so that peak memory is its own), in interleaved rounds (so that other load on the
machine falls on all of them). "fastllm" runs the fused kernels, "fastllm_torch" the plain-torch
reference of the same model. All run with transparent huge pages for tensors, as the trainer's
launcher sets them. Reported: the best round's median step, tokens/s, model TFLOPs (full
attention) and peak resident memory. Differences below some 8 % are noise on a shared machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

VOCAB, SEQ_LEN, MICRO = 32_000, 512, 4
ARCH = {
    "family": "llama",
    "layers": 8,
    "hidden": 512,
    "heads": 8,
    "kv_heads": 8,
    "head_dim": 64,
    "ffn_hidden": 1376,
    "vocab": VOCAB,
    "max_seq_len": SEQ_LEN,
}
IMPLEMENTATIONS = ("fastllm", "fastllm_torch", "hf", "hf_compile")
WARM_UP, STEPS = 2, 4


def run_one(name: str, dtype_name: str, threads: int, steps: int) -> dict[str, Any]:
    """Time one implementation in this process."""
    import resource

    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if dtype_name == "bf16" else torch.float32
    if name.startswith("fastllm"):
        parameters, loss_of = build_fastllm(dtype, "torch" if name.endswith("torch") else "fused")
    else:
        parameters, loss_of = build_hugging_face(dtype, compiled=name.endswith("compile"))
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    tokens = torch.randint(VOCAB, (MICRO, SEQ_LEN))
    times: list[float] = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        loss_of(tokens).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"step_s": statistics.median(times[WARM_UP:]), "peak_gib": memory}


def build_fastllm(dtype: Any, kernels: str) -> tuple[list[Any], Callable[[Any], Any]]:
    import torch

    from fastllm_planner.arch import spec_from_dict
    from fastllm_train.models.decoder import Decoder, TrainingModel
    from fastllm_train.models.initialise import initialise
    from fastllm_train.models.kernels import kernels_of

    spec = spec_from_dict(ARCH)
    model = TrainingModel(Decoder(spec, kernels=kernels_of(kernels)))
    initialise(model, spec, 0)
    model.to(dtype)
    positions = torch.arange(SEQ_LEN).expand(MICRO, -1)
    mask = torch.ones(MICRO, SEQ_LEN)

    def loss_of(tokens: Any) -> Any:
        loss = model(tokens, positions, tokens.roll(-1, 1), mask)
        return loss.objective / mask.sum()

    return list(model.parameters()), loss_of


def build_hugging_face(dtype: Any, *, compiled: bool) -> tuple[list[Any], Callable[[Any], Any]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from fastllm_planner.arch import spec_from_dict, to_hf_config

    config = AutoConfig.for_model(**to_hf_config(spec_from_dict(ARCH)))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=dtype)
    run: Any = torch.compile(model) if compiled else model
    return list(model.parameters()), lambda tokens: run(input_ids=tokens, labels=tokens).loss


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    from fastllm_planner.arch import spec_from_dict
    from fastllm_planner.flops import model_flops_per_token

    flops = model_flops_per_token(spec_from_dict(ARCH), SEQ_LEN, "full")
    rows = [f"{'implementation':<16}{'step s':>8}{'tokens/s':>10}{'TFLOPs':>8}{'GiB':>7}"]
    for name, found in results.items():
        best = min(result["step_s"] for result in found)
        rate = MICRO * SEQ_LEN / best
        memory = max(result["peak_gib"] for result in found)
        rows.append(f"{name:<16}{best:>8.3f}{rate:>10.0f}{rate * flops / 1e12:>8.3f}{memory:>7.2f}")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(run_one(args.only, args.dtype, args.threads, args.steps)))
        return
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in IMPLEMENTATIONS}
    for _ in range(args.rounds):
        for name in IMPLEMENTATIONS:
            command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
            env = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
            results[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(name, results[name][-1], file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
