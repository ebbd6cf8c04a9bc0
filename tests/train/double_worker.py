"""One rank of the fp64 tests of ZeRO: DeepSpeed's engine in double precision against the whole
model in this process.

DeepSpeed has no fp64 mode: what its modules call ``torch.float32`` is float64 here, and so is what
``Tensor.float`` makes. SGD's update shows the gradient: it is the gradient times the rate, a power
of two so large that the weights vanish beside it.

Usage: double_worker.py LISTING.json OUT.json; LISTING: [parallel] by a name that begins with the
family and a colon. Writes the largest relative errors, by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from layout_worker import config_of, micro_batches, whole_gradients
from planted import left_out_once, replaced
from train_worker import mean_of_means

from fastllm_planner.arch import ArchSpec, ParamSpec
from fastllm_train.config import Config
from fastllm_train.models.initialise import initial_value
from fastllm_train.optimizer import OptimConfig
from fastllm_train.precision import PrecisionConfig
from fastllm_train.tensor_parallel import apply
from fastllm_train.tensor_parallel.apply import join_from_ranks

RATE = 2.0**20
MODULES = (
    "fastllm_train.engine_deepspeed",
    "deepspeed.accelerator.cpu_accelerator",
    "deepspeed.runtime.engine",
    "deepspeed.runtime.base_optimizer",
    "deepspeed.runtime.utils",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.partition_parameters",
)


class DoubleTorch(ModuleType):
    """torch, with float64 by the name of float32."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def in_double() -> Iterator[None]:
    """DeepSpeed and the engine keep and reduce everything in fp64."""
    double = DoubleTorch("torch")
    with ExitStack() as stack:
        for name in MODULES:
            stack.enter_context(patch.object(importlib.import_module(name), "torch", double))
        stack.enter_context(patch.object(torch.Tensor, "float", torch.Tensor.double))
        dtype = property(lambda _: torch.float64)
        stack.enter_context(patch.object(PrecisionConfig, "torch_dtype", dtype))
        yield


def whole_weight(spec: ArchSpec, param: ParamSpec) -> torch.Tensor:
    """What ``layout_worker.filled`` gives a parameter of the whole model."""
    value = initial_value(spec, param, 1).double()
    if value.ndim == 1:
        value += torch.linspace(-0.2, 0.3, param.shape[0], dtype=torch.float64)
    return value


def engine_gradients(config: Config, spec: ArchSpec) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of the global batch and the whole gradients of what this rank holds."""
    import deepspeed

    from fastllm_train.engine_deepspeed import DeepSpeedEngine

    engine = DeepSpeedEngine(config, spec, "cpu", weights=lambda p: whole_weight(spec, p))
    mesh = engine._mesh
    batches = micro_batches(config, spec, mesh.at.dp(config.parallel))
    outcome = engine.train_step(batches, RATE, stop=False)
    sharded = config.parallel.zero_stage == 3
    gathered: Any = deepspeed.zero.GatheredParameters if sharded else lambda _: nullcontext()
    grads: dict[str, torch.Tensor] = {}
    for param, named in engine._state.parameters():
        with gathered([named]):
            assert named.dtype == torch.float64
            after = join_from_ranks(spec, mesh, param, named.detach())
        grads[param.name] = (whole_weight(spec, param) - after) / RATE
    return outcome.loss, grads


def error_of(name: str, layout: dict[str, Any]) -> dict[str, float]:
    """Relative errors of the loss and of the worst gradient that this rank holds."""
    config = config_of(name, layout)
    optim = OptimConfig("sgd", lr=RATE, clip=0.0, weight_decay=0.0)
    config = dataclasses.replace(config, optim=optim)
    spec = config.model.resolve()
    with in_double():
        loss, want = whole_gradients(name.split(":")[0], spec)
        got_loss, got = engine_gradients(config, spec)
    total = torch.stack([g.norm() for g in want.values()]).norm()
    worst = max(
        float((got[n] - want[n]).norm() / torch.max(want[n].norm(), 1e-3 * total)) for n in got
    )
    return {"loss": abs(got_loss - loss) / loss, "gradient": worst}


# What a name may end in → what is done wrong.
BROKEN = ("without one sum", "with a mean of means")


@contextmanager
def planted(name: str) -> Iterator[None]:
    from fastllm_train.engine_deepspeed import DeepSpeedEngine

    if name.endswith("without one sum"):
        with replaced(apply, "sum_over_ranks", left_out_once()):
            yield
    elif name.endswith("with a mean of means"):
        with replaced(DeepSpeedEngine, "_tensors", mean_of_means):
            yield
    else:
        yield


def main() -> None:
    from fastllm_train.distributed import join, place_from_env

    place = place_from_env(os.environ)
    assert place is not None
    join(place, "cpu")
    found: dict[str, dict[str, float]] = {}
    for name, layout in json.loads(Path(sys.argv[1]).read_text()).items():
        with planted(name):
            found[name] = error_of(name, layout)
    keys = ("loss", "gradient")
    worst = torch.tensor([[error[key] for key in keys] for error in found.values()])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    if place.rank == 0:
        rows = zip(found, worst.tolist(), strict=True)
        table = {name: dict(zip(keys, row, strict=True)) for name, row in rows}
        Path(sys.argv[2]).write_text(json.dumps(table))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
