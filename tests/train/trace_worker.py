"""The real DeepSpeed engine on small real tensors, as rank 0 of a job that does not exist, traced.

Usage: trace_worker.py OUT.json; writes the peak of a later step in bytes, by case.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from train_layouts import tiny_config

from fastllm_train.config import Config

WORLD_SIZE = 8
ARCH = {
    "family": "llama",
    "layers": 4,
    "hidden": 128,
    "heads": 4,
    "kv_heads": 4,
    "head_dim": 32,
    "ffn_hidden": 344,
    "vocab": 4000,
    "max_seq_len": 256,
}
CASES: dict[str, tuple[int, str, int]] = {
    "zero0 fp32": (0, "fp32", 2),
    "zero1 fp32": (1, "fp32", 2),
    "zero1 bf16": (1, "bf16", 2),
    "zero1 bf16, no accumulation": (1, "bf16", 1),
    "zero2 bf16": (2, "bf16", 3),
}
# Of the torch engine: the stage, dtype, what micro-batches are added up in, how many there are; how
# the masters are kept, if not by default.
TORCH_CASES: dict[str, tuple[Any, ...]] = {
    "torch fp32": (0, "fp32", "model", 2),
    "torch bf16": (0, "bf16", "model", 1),
    "torch bf16, whole masters": (0, "bf16", "model", 1, "whole"),
    "torch bf16, fp32 sums": (0, "bf16", "fp32", 2),
    "torch zero1 fp32": (1, "fp32", "model", 1),
    "torch zero1 bf16": (1, "bf16", "model", 2),
    "torch zero1 bf16, whole masters": (1, "bf16", "model", 2, "whole"),
    "torch zero1 bf16, fp32 sums": (1, "bf16", "fp32", 2),
}


def config_of(stage: int, dtype: str, accumulation: int, **parallel: Any) -> Config:
    return tiny_config(
        model={"arch": ARCH},
        parallel={"dp": WORLD_SIZE, "zero_stage": stage, **parallel},
        batch={"micro": 4, "global": 4 * WORLD_SIZE * accumulation, "seq_len": 256},
        optim={"name": "adamw", "lr": 1e-4},
        precision={"dtype": dtype},
    )


def torch_config_of(
    stage: int, dtype: str, accumulate: Any, accumulation: int, masters: Any = "auto"
) -> Config:
    config = config_of(stage, dtype, accumulation)
    precision = replace(config.precision, accumulate=accumulate, masters=masters)
    return replace(config, speed=replace(config.speed, engine="torch"), precision=precision)


def peak_of(config: Config) -> int:
    """Of the third step: everything that is made once is there."""
    from fastllm_train.data import SyntheticSamples, read_step
    from fastllm_train.engine_choice import build_engine
    from fastllm_train.trace.tracer import MemoryTracer

    batch = config.batch
    source = SyntheticSamples(batch.global_size, batch.seq_len, 4000, 1)
    batches = read_step(source, 0, batch, WORLD_SIZE, 0, 4000)
    tracer = MemoryTracer()
    with tracer:
        engine = build_engine(config, config.model.resolve(), "cpu")
        for _ in range(3):
            tracer.peak.total = 0
            engine.train_step(batches, 1e-4, stop=False)
    return tracer.peak.total


def main() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from fastllm_train.deepspeed_setup import import_deepspeed

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(WORLD_SIZE))
    dist.init_process_group("fake", rank=0, world_size=WORLD_SIZE, store=FakeStore())
    deepspeed = import_deepspeed("cpu")
    deepspeed.init_distributed(dist_backend="fake", auto_mpi_discovery=False, verbose=False)
    found = {name: peak_of(config_of(*case)) for name, case in CASES.items()}
    found |= {name: peak_of(torch_config_of(*case)) for name, case in TORCH_CASES.items()}
    Path(sys.argv[1]).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
