"""Jobs that several tests ask about."""

from __future__ import annotations

from typing import Any

from fastllm_planner.arch import preset
from fastllm_planner.backends import backend
from fastllm_planner.hardware import Cluster, gpu
from fastllm_planner.plan import Job


def job(model: str, device: str, n: int, stack: str, **changes: Any) -> Job:
    """A job of ``n`` devices; 32 sequences of 2048 tokens a step unless changed."""
    per_node = min(n, changes.pop("per_node", 8))
    cluster = Cluster(gpu(device), n, per_node, host_memory_bytes=changes.pop("host", None))
    sizes = {"global_batch": 32, "seq_len": 2048, **changes}
    return Job(model, preset(model), cluster, backend(stack), **sizes)
