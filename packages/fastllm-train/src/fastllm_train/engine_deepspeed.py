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
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

from fastllm_planner.arch import ArchSpec
from fastllm_train.config import Config
from fastllm_train.data import MicroBatch
from fastllm_train.deepspeed_config import deepspeed_config, effective_zero_stage
from fastllm_train.engine import StepOutcome
from fastllm_train.models.decoder import Decoder, TrainingModel, assert_parameters
from fastllm_train.models.initialise import initialise
from fastllm_train.optimizer import build_optimizer, parameter_groups

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
    """See ``Engine``. Data-parallel only: tensor and pipeline sizes are 1."""

    def __init__(self, config: Config, spec: ArchSpec, device: str) -> None:
        deepspeed = import_deepspeed(device)
        self._config = config
        self._device = torch.device(device)
        self._stage, _ = effective_zero_stage(config)
        settings = deepspeed_config(config)
        sharded = self._stage == 3
        dtype = config.precision.torch_dtype
        # No dtype argument: where fp16 is unsupported (CPU), DeepSpeed 0.19 takes bf16 whatever it
        # says (`dtype or fp16 if supported else bf16`); from the configuration it reads it right.
        construct = deepspeed.zero.Init(config_dict_or_path=settings) if sharded else nullcontext()
        with construct:
            model = TrainingModel(Decoder(spec, recompute=config.parallel.recompute))
        assert_parameters(model, spec)
        self._gather = deepspeed.zero.GatheredParameters
        gather = (lambda p: self._gather([p], modifier_rank=0)) if sharded else None
        initialise(model, spec, config.run.seed, gather)
        model.to(device=self._device, dtype=dtype)
        groups = parameter_groups(model.named_parameters(), config.optim.weight_decay)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=build_optimizer(config.optim, groups),
            config=settings,
            dist_init_required=False,
        )
        self._model = model

    def train_step(self, batches: Sequence[MicroBatch], lr: float, *, stop: bool) -> StepOutcome:
        """One step. Gradients are those of Σ w·loss / Σ w over the **global** batch: weights are
        summed over ranks first, so accumulation and data parallelism change nothing."""
        clock = _Clock(self._device)
        weight = self._global_sum([sum(float(b.loss_mask.sum()) for b in batches)])[0]
        # DeepSpeed averages over ranks and micro-batches; this makes it the global mean.
        scale = dist.get_world_size() * len(batches) / max(weight, 1.0)
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
        self._engine.save_checkpoint(
            str(folder.parent),
            tag=folder.name,
            client_state={STATE_KEY: dict(state)},
            save_latest=False,
        )

    def load(self, folder: Path) -> dict[str, Any]:
        path, state = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None or STATE_KEY not in state:
            raise RuntimeError(f"DeepSpeed could not load {folder}")
        return state[STATE_KEY]

    def master_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        from deepspeed.utils import safe_get_full_fp32_param

        for name, param in self._model.named_parameters():
            value = param.detach() if self._stage == 0 else safe_get_full_fp32_param(param)
            assert value is not None, name
            shape = getattr(param, "ds_shape", param.shape)
            yield name, value.detach().float().cpu().reshape(shape).clone()

    def _to_device(self, array: Any) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)

    def _global_sum(self, values: Sequence[float]) -> list[float]:
        packed = torch.tensor(values, dtype=torch.float64, device=self._device)
        dist.all_reduce(packed)
        return packed.tolist()

    def _norm_of_gradients(self) -> float:
        """ZeRO-0 reports no norm. The gradients are already reduced, hence equal on every rank."""
        grads = [p.grad for p in self._model.parameters() if p.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads])
        return math.sqrt(float(norms.double().square().sum()))


class _Clock:
    """Seconds per phase; on CUDA a phase's end is its kernels' end only at the step's end."""

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
