"""DeepSpeed behind ``Engine``: ZeRO 0-3, offload, its own checkpoint layout."""

from __future__ import annotations

import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from fastllm_planner.arch import ArchSpec, ParamSpec, iter_params
from fastllm_train.config import Config
from fastllm_train.data import MicroBatch
from fastllm_train.deepspeed_config import deepspeed_config, effective_zero_stage
from fastllm_train.deepspeed_states import MOMENTS, EngineStates
from fastllm_train.engine import StepOutcome
from fastllm_train.models.decoder import Decoder, TrainingModel, assert_parameters
from fastllm_train.models.initialise import initialise
from fastllm_train.optimizer import build_optimizer, parameter_groups
from fastllm_train.portable import (
    PortableCheckpoint,
    WholeState,
    is_portable,
    write_description,
    write_share,
)
from fastllm_train.tensor_parallel.apply import (
    cut_to_rank,
    join_from_ranks,
    mark_sharded,
    parallelise,
)
from fastllm_train.tensor_parallel.mesh import build_mesh

STATE_KEY = "fastllm"


def import_deepspeed(device: str) -> ModuleType:
    """DeepSpeed, with its log on stderr and without a compiler.

    On CPU it would build ``deepspeed_shm_comm`` with g++ at the first ``init_distributed`` (half a
    minute); gloo does that work here.
    """
    os.environ.setdefault("DS_ACCELERATOR", device)
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 deprecates; nothing a user can do.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.")
    import deepspeed
    from deepspeed.ops import __compatible_ops__ as buildable

    buildable["deepspeed_shm_comm"] = False
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    return deepspeed


class DeepSpeedEngine:
    """See ``Engine``. Data and tensor parallel; one pipeline stage."""

    def __init__(
        self,
        config: Config,
        spec: ArchSpec,
        device: str,
        start: PortableCheckpoint | None = None,
    ) -> None:
        """``start``: a portable checkpoint to take the weights from; ``load`` it afterwards."""
        deepspeed = import_deepspeed(device)
        self._spec = spec
        self._start = start
        self._optimizer_name = config.optim.name
        self._portable = config.checkpoint.format == "portable"
        self._device = torch.device(device)
        self._stage, _ = effective_zero_stage(config)
        self._mesh = build_mesh(config.parallel)
        settings = deepspeed_config(config)
        self._model = self._build(config, settings)
        groups = parameter_groups(self._model.named_parameters(), config.optim.weight_decay)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self._model,
            optimizer=build_optimizer(config.optim, groups),
            config=settings,
            mpu=self._mesh,
            dist_init_required=False,
        )
        self._states = EngineStates(self._engine, self._stage, MOMENTS[config.optim.name])

    def _build(self, config: Config, settings: dict[str, Any]) -> TrainingModel:
        """The model of this rank with its initial weights, on its device and in its dtype."""
        import deepspeed

        spec, mesh = self._spec, self._mesh
        # Under ZeRO-3 modules are sharded as they are made. A tensor-parallel model is cut first.
        # No dtype argument: where fp16 is unsupported (CPU), DeepSpeed 0.19 takes bf16 whatever it
        # says (`dtype or fp16 if supported else bf16`); from the configuration it reads it right.
        sharded = self._stage == 3 and mesh.tp == 1
        construct = deepspeed.zero.Init(config_dict_or_path=settings) if sharded else nullcontext()
        with construct:
            model = TrainingModel(Decoder(spec, recompute=config.parallel.recompute))
        assert_parameters(model, spec)
        cut = None
        if mesh.tp > 1:
            parallelise(model, spec, mesh, sequence_parallel=config.parallel.sequence_parallel)
            mark_sharded(model, spec, mesh)
            cut = partial(cut_to_rank, spec, mesh)
        gathered = deepspeed.zero.GatheredParameters
        gather = (lambda p: gathered([p], modifier_rank=0)) if sharded else None
        value = None if self._start is None else self._start.weight
        initialise(model, spec, config.run.seed, gather, cut, value)
        return model.to(device=self._device, dtype=config.precision.torch_dtype)

    def train_step(self, batches: Sequence[MicroBatch], lr: float, *, stop: bool) -> StepOutcome:
        """One step. Gradients are those of Σ w·loss / Σ w over the **global** batch: weights are
        summed over ranks first, so accumulation and data parallelism change nothing."""
        clock = _Clock(self._device)
        weight = self._global_sum([sum(float(b.loss_mask.sum()) for b in batches)])[0]
        # DeepSpeed averages over ranks and micro-batches; this makes it the global mean.
        scale = self._mesh.dp * len(batches) / max(weight, 1.0)
        norm: float | None = None
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for batch in batches:
            tensors = [
                self._to_device(a)
                for a in (batch.tokens, batch.position_ids, batch.labels, batch.loss_mask)
            ]
            loss = self._engine(*tensors)
            total += loss.cross_entropy.double()
            clock.lap("forward")
            self._engine.backward(loss.objective * scale)
            clock.lap("backward")
            if batch is batches[-1]:
                for group in self._optimizer.param_groups:
                    group["lr"] = lr
                if self._stage == 0:
                    norm = self._norm_of_gradients()
            self._engine.step()
            clock.lap("optimizer")
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        loss_sum, asked = self._global_sum([float(total), float(stop)])
        return StepOutcome(loss_sum / max(weight, 1.0), norm, asked > 0, clock.seconds)

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        if not self._portable:
            self._engine.save_checkpoint(
                str(folder.parent),
                tag=folder.name,
                client_state={STATE_KEY: {**state, "rng": torch.get_rng_state()}},
                save_latest=False,
            )
            return
        rank, world_size = dist.get_rank(), dist.get_world_size()
        write_share(folder, self._whole_states(), rank, world_size)
        if rank == 0:
            write_description(folder, self._spec, state, world_size)

    def load(self, folder: Path) -> dict[str, Any]:
        if is_portable(folder):
            return self._load_portable(folder)
        path, state = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None or STATE_KEY not in state:
            raise RuntimeError(f"DeepSpeed could not load {folder}")
        torch.set_rng_state(state[STATE_KEY]["rng"])
        return state[STATE_KEY]

    def master_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for param, named in self._parameters():
            yield param.name, self._joined(param, self._states.weight(named))

    def _load_portable(self, folder: Path) -> dict[str, Any]:
        start = self._start
        if start is None or start.folder != folder:
            raise RuntimeError(f"the engine was not started from {folder}")
        self._states.begin_restore(start.state["step"])
        for param, named in self._parameters():
            moments = start.moments(param, MOMENTS[self._optimizer_name])
            values = {
                key: cut_to_rank(self._spec, self._mesh, param, value).to(self._device)
                for key, value in moments.items()
            }
            weight = cut_to_rank(self._spec, self._mesh, param, start.weight(param))
            self._states.restore(named, weight.to(self._device), values)
        return start.state

    def _whole_states(self) -> Iterator[WholeState]:
        self._states.link()
        for param, named in self._parameters():
            weight = self._joined(param, self._states.weight(named))
            moments = self._states.moments(named)
            whole = {key: self._joined(param, value) for key, value in moments.items()}
            yield WholeState(param.name, weight, whole)

    def _parameters(self) -> Iterator[tuple[ParamSpec, torch.nn.Parameter]]:
        by_name = {p.name: p for p in iter_params(self._spec)}
        return ((by_name[name], param) for name, param in self._model.named_parameters())

    def _joined(self, param: ParamSpec, part: torch.Tensor) -> torch.Tensor:
        return join_from_ranks(self._spec, self._mesh, param, part).cpu()

    def _to_device(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _global_sum(self, values: Sequence[float]) -> list[float]:
        """Sums over the replicas; ranks of one replica must agree on their values (or, for a flag,
        one suffices: the sum is then above zero on all)."""
        packed = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(packed)
        return (packed / self._mesh.tp).tolist()

    def _norm_of_gradients(self) -> float:
        """ZeRO-0 reports no norm. The gradients are already reduced over the replicas; of a tensor
        that tensor-parallel ranks hold in copies, one rank's counts."""
        first = self._mesh.tp_rank == 0
        squares = torch.zeros((), dtype=torch.float64, device=self._device)
        for param in self._model.parameters():
            if param.grad is not None and (first or hasattr(param, "tensor_model_parallel")):
                squares += torch.linalg.vector_norm(param.grad, dtype=torch.float32).double() ** 2
        dist.all_reduce(squares, group=self._mesh.tp_group)
        return math.sqrt(float(squares))


class _Clock:
    """Seconds per phase; on CUDA a phase's end is its kernels' end only at the step's end."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
