"""Training steps of one rank on fake tensors, traced: its part of the model, the pipeline's
schedule, the optimizer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fastllm_planner.arch import ArchSpec
from fastllm_train.config import Config
from fastllm_train.engine_choice import chosen_engine
from fastllm_train.expert_parallel import mark_parameters
from fastllm_train.layout import Coordinates
from fastllm_train.mesh import Mesh, build_mesh
from fastllm_train.model_part import (
    activation_shape,
    build_part,
    materialise,
    tie_ends,
)
from fastllm_train.models.decoder import TrainingModel
from fastllm_train.pipeline.exchange import Exchange
from fastllm_train.pipeline.run import Runner
from fastllm_train.pipeline.stage import PipelineStage
from fastllm_train.trace.balanced import balance_routing
from fastllm_train.trace.engine_states import TorchEngineMemory
from fastllm_train.trace.tracer import MemoryTracer, Peak
from fastllm_train.trace.zero import ZeroMemory

CPU = torch.device("cpu")
STEPS = 2  # the optimizer's moments appear in the first


@dataclass(frozen=True)
class StageTrace:
    """What one rank of a pipeline stage needs: bytes at the fullest moment of its steps."""

    stage: int
    layers: int
    params: int
    peak: Peak


def stages_to_trace(pp: int) -> list[int]:
    """The first holds the most activations, the last the head; one between them may hold more
    layers than either."""
    return sorted({0, 1, pp - 1}) if pp > 2 else list(range(pp))


def trace_stage(config: Config, spec: ArchSpec, stage: int, *, fake: bool = True) -> StageTrace:
    """Trace the first rank of ``stage``; ``fake`` False: on real tensors, in the memory of this
    machine. The process must be in no process group."""
    parallel = config.parallel
    rank = parallel.rank_of(Coordinates(stage, 0, 0, 0, 0))
    with fake_job(rank, parallel.world_size):
        mesh = build_mesh(parallel)
        part = build_part(config, spec, mesh, prepare=lambda m: balance_routing(m, parallel.ep))
        # Fake tokens do not say where documents end; one as long as the sequence needs as much.
        part.model.documents = False
        tracer = MemoryTracer("weights")
        mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
        with mode, tracer:
            copy = materialise(part, CPU, config.precision.torch_dtype)
            if parallel.ep > 1:
                mark_parameters(part)
            _run_steps(config, spec, mesh, part, copy, tracer)
        params = sum(p.numel() for p in part.parameters())
        return StageTrace(stage, len(part.model.layers), params, tracer.peak)


def _run_steps(
    config: Config,
    spec: ArchSpec,
    mesh: Mesh,
    part: TrainingModel | PipelineStage,
    copy: Tensor | None,
    tracer: MemoryTracer,
) -> None:
    torch_alone = chosen_engine(config) == "torch"
    states = (TorchEngineMemory if torch_alone else ZeroMemory)(config, mesh, part, tracer)
    shape, dtype = activation_shape(config, spec), config.precision.torch_dtype
    exchange = Exchange(mesh, shape, dtype, CPU)
    tied = tie_ends(part, copy, mesh, exchange)
    # More than a full pipeline of micro-batches repeats itself.
    count = min(config.batch.accumulation(mesh.parallel.dp), mesh.parallel.pp + 1)
    left = count

    def call(*args: object) -> object:
        tracer.phase = "activations"
        return part(*args)

    def backward(objective: Tensor) -> None:
        nonlocal left
        left -= 1
        states.before_backward(last=left == 0)
        tracer.phase = "backward"
        objective.backward()
        states.after_backward()

    def done(last: bool) -> None:
        nonlocal left
        if last:
            states.step()
            left = count
        else:
            tracer.track((p.grad for p in part.parameters() if p.grad is not None), "gradients")

    for _ in range(STEPS):
        tracer.phase = "batch"
        batches = [_micro_batch(config) for _ in range(count)]
        Runner(mesh, exchange, tied, call, backward, done).run(batches, 1.0)
        exchange.finish()


def _micro_batch(config: Config) -> list[Tensor]:
    shape = (config.batch.micro, config.batch.seq_len // config.parallel.cp)
    tokens, positions, labels = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    return [tokens, positions, labels, torch.ones(shape)]


@contextmanager
def fake_job(rank: int, world_size: int) -> Iterator[None]:
    """A process group of ``world_size`` of which only this process exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
