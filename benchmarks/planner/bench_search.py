"""Seconds of one search and of one estimate, after start-up; least and median of several rounds.

Usage: python benchmarks/planner/bench_search.py [--rounds 7]

The search is all of LLaMA-2-70B on 1,024 H100; the estimate is one given layout of DeepSeek-V3.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

from fastllm_planner.arch import preset
from fastllm_planner.backends import backend
from fastllm_planner.hardware import Cluster, gpu
from fastllm_planner.layout import Layout
from fastllm_planner.plan import Job, price_layout
from fastllm_planner.search import search


def job(model: str, device: str, gpus: int, stack: str) -> Job:
    cluster = Cluster(gpu=gpu(device), n_gpus=gpus)
    return Job(
        name=model,
        spec=preset(model),
        cluster=cluster,
        backend=backend(stack),
        global_batch=1024,
        seq_len=4096,
    )


def seconds(action: Callable[[], object], rounds: int) -> dict[str, float]:
    times: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return {"least": round(min(times), 4), "median": round(statistics.median(times), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    result: dict[str, object] = {}
    for stack in ("megatron-fused", "fastllm"):
        question = job("llama-2-70b", "H100-SXM", 1024, stack)
        found = search(question)
        result[f"search llama-2-70b, 1024 GPUs, {stack}"] = {
            **seconds(lambda q=question: search(q), rounds),
            "layouts_priced": found.priced,
        }
    question = job("deepseek-v3", "H100-SXM", 1024, "megatron-fused")
    layout = Layout(dp=32, tp=2, pp=16, ep=8, global_batch=1024)
    result["estimate deepseek-v3"] = seconds(lambda: price_layout(question, layout), rounds)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
