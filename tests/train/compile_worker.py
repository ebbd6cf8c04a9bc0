"""One rank of the tests of compiled layers under tensor parallelism.

Usage: compile_worker.py OUT.json; writes, by layout and back end, the largest relative error of a
compiled gradient against the same part's without the compiler, and the graph breaks.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layout_worker import config_of, filled

from fastllm_train.distributed import enter_group, place_from_env
from fastllm_train.mesh import build_mesh
from fastllm_train.model_part import build_part, materialise
from fastllm_train.models.decoder import TrainingModel
from fastllm_train.tensor_parallel.apply import cut_to_rank

RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "tp2": ({"tp": 2}, "aot_eager"),
    "tp2, full": ({"tp": 2, "recompute": "full"}, "aot_eager"),
    "tp2 sp, inductor": ({"tp": 2, "sequence_parallel": True}, "inductor"),
}


def gradients(part: TrainingModel, batch: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    part.zero_grad()  # to None: those of the run before stay as they are
    loss = part(*batch)
    loss.objective.backward()
    return [loss.cross_entropy, *(p.grad for p in part.parameters() if p.grad is not None)]


def compare(layout: dict[str, Any], backend: str) -> dict[str, float]:
    config = config_of("one key head", layout)
    config = replace(config, speed=replace(config.speed, kernels="fused"))
    spec = config.model.resolve()
    mesh = build_mesh(config.parallel)
    part = build_part(config, spec, mesh)
    assert isinstance(part, TrainingModel)
    materialise(part, torch.device("cpu"), torch.float32)
    filled(part, spec, partial(cut_to_rank, spec, mesh))
    tokens = torch.randint(spec.vocab, (2, 32), generator=torch.Generator().manual_seed(7))
    batch = (tokens, torch.arange(32).expand(2, -1), tokens.roll(-1, 1), torch.ones(2, 32))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    want = gradients(part, batch)
    part.model.compile_layers(backend=backend)
    got = gradients(part, batch)
    counters = torch._dynamo.utils.counters
    return {
        "error": max(float((a - b).norm() / b.norm()) for a, b in zip(got, want, strict=True)),
        "breaks": sum(counters["graph_break"].values()),
        "graphs": counters["stats"]["unique_graphs"],
    }


def main() -> None:
    place = place_from_env(os.environ)
    assert place is not None
    enter_group(place, "gloo")
    torch.set_num_threads(1)
    found = {name: compare(*run) for name, run in RUNS.items()}
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
