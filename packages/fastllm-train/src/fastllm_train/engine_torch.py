"""The engine on torch alone, behind ``Engine``: every layout of ZeRO-0 and ZeRO-1."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastllm_planner.arch import ArchSpec, ParamSpec
from fastllm_train.config import Config
from fastllm_train.data import MicroBatch
from fastllm_train.engine import Judge, StepOutcome, accept_all
from fastllm_train.engine_choice import cuts_states, splits_masters
from fastllm_train.engine_state import PartState, named_by_spec
from fastllm_train.engine_step import (
    HeapTrim,
    StepClock,
    any_rank,
    batch_tensors,
    global_sum,
    global_weight,
)
from fastllm_train.errors import UserError
from fastllm_train.gradient_sums import GradientSums, replica_groups, shared_out
from fastllm_train.master_weights import MasterWeights
from fastllm_train.mesh import Mesh, build_mesh
from fastllm_train.model_part import activation_shape, build_part, materialise, owners, tie_ends
from fastllm_train.models.decoder import TrainingModel
from fastllm_train.models.initialise import initialise
from fastllm_train.ops.grad_norm import clip_coefficient, sum_of_squares
from fastllm_train.optimizer import MOMENTS
from fastllm_train.pipeline.exchange import Exchange
from fastllm_train.pipeline.run import Runner
from fastllm_train.pipeline.stage import PipelineStage
from fastllm_train.portable import PortableCheckpoint, is_portable
from fastllm_train.sharded_weights import ShardedWeights
from fastllm_train.tensor_parallel.apply import counts_here, cut_to_rank


class TorchEngine:
    """See ``Engine``. Replicas add up their gradients (``gradient_sums``). A rank updates its part
    with ``master_weights``; with ZeRO-1 only its share of that, with ``sharded_weights``."""

    def __init__(
        self,
        config: Config,
        spec: ArchSpec,
        device: str,
        start: PortableCheckpoint | None = None,
        weights: Callable[[ParamSpec], torch.Tensor] | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Arguments as ``DeepSpeedEngine``'s; ``start`` is loaded here already."""
        self._spec, self._progress, self._clip = spec, progress, config.optim.clip
        self._device = torch.device(device)
        self._mesh = mesh = build_mesh(config.parallel)
        dtype = config.precision.torch_dtype
        self._model = part = build_part(config, spec, mesh)
        copy = materialise(part, self._device, dtype)
        if start is None:
            cut = partial(cut_to_rank, spec, mesh)
            initialise(part, spec, config.run.seed, cut=cut, value_of=weights)
        self._sums, self._states = build_states(config, part, mesh)
        moments = MOMENTS[config.optim.name]
        whole = (self._device, part, self._states, owners(config, spec), moments)
        self._state = PartState(spec, mesh, *whole)
        self._exchange = Exchange(mesh, activation_shape(config, spec), dtype, self._device)
        self._tied = tie_ends(part, copy, mesh, self._exchange)
        self._heap = HeapTrim(self._device)
        self._counted, self._cut = _counted(self._state, mesh), cuts_states(config)
        self._loaded: PortableCheckpoint | None = None
        if start is not None:
            self._restore(start)
            self._loaded = start
        elif self._tied is not None:
            self._tied.share_weight()

    def train_step(
        self,
        batches: Sequence[MicroBatch],
        lr: float,
        *,
        stop: bool,
        judge: Judge = accept_all,
    ) -> StepOutcome:
        """One step. Gradients are those of Σ w·loss / Σ w over the **global** batch: weights are
        summed over ranks first, so accumulation and data parallelism change nothing."""
        self._loaded = None
        clock = StepClock(self._progress)
        tensors = [self._tensors(batch) for batch in batches]
        weight = max(global_weight(tensors, self._mesh, self._device), 1.0)
        left = len(tensors)

        def backward(objective: torch.Tensor) -> None:
            nonlocal left
            left -= 1
            self._sums.before_backward(last=left == 0)
            objective.backward()

        total = self._runner(backward, clock.lap).run(tensors, 1 / weight)
        self._sums.finish()
        clock.lap("backward")
        loss = global_sum([float(total)], self._mesh, self._device)[0] / weight
        on_device = self._grad_norm()
        norm = float(on_device)
        updated = judge(loss, norm, None)
        if updated:
            scale = clip_coefficient(on_device.float(), self._clip) if self._clip else None
            self._states.update(self._sums.of, lr, scale)
        self._sums.clear()
        self._heap.after_step()
        if self._tied is not None:
            self._tied.share_weight()
        self._exchange.finish()
        asked = any_rank(stop, self._device)
        clock.lap("optimizer")
        return StepOutcome(loss, norm, asked, clock.seconds, updated)

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, float]:
        tensors = [self._tensors(batch) for batch in batches]
        self._model.eval()
        total = self._runner(lambda _: None, lambda _: None).evaluate(tensors)
        self._exchange.finish()
        self._model.train()
        weight = global_weight(tensors, self._mesh, self._device)
        return global_sum([float(total)], self._mesh, self._device)[0], weight

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        self.snapshot(state)(folder)

    def snapshot(self, state: Mapping[str, Any]) -> Callable[[Path], None]:
        counted = {"optimizer_steps": self._states.steps, "loss_scaler": {}}
        return self._state.snapshot({**state, **counted})

    def load(self, folder: Path) -> dict[str, Any]:
        if not is_portable(folder):
            raise UserError(
                f"{folder} was written by DeepSpeed, which alone reads it",
                hint='go on with speed.engine="deepspeed" in the layout it was written in',
            )
        if self._loaded is None or self._loaded.folder != folder:
            self._loaded = PortableCheckpoint(folder, self._spec)
            self._restore(self._loaded)
        state, self._loaded = self._loaded.state, None
        return state

    def master_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        return self._state.master_parameters()

    def _restore(self, start: PortableCheckpoint) -> None:
        self._state.restore(start)
        if self._tied is not None:
            self._tied.share_weight()
            self._exchange.finish()

    def _runner(
        self, backward: Callable[[torch.Tensor], object], lap: Callable[[str], None]
    ) -> Runner:
        return Runner(
            self._mesh, self._exchange, self._tied, self._model, backward, lambda _: None, lap
        )

    def _tensors(self, batch: MicroBatch) -> list[torch.Tensor]:
        return batch_tensors(batch, self._mesh, self._device)

    def _grad_norm(self) -> torch.Tensor:
        """Of the summed gradients of the whole model, fp64. What ranks of a replica hold in copies
        counts once; experts that replicas share out are added up over them, and so are shares."""
        mesh = self._mesh
        experts, others = (self._squares(group) for group in self._counted)
        if mesh.parallel.ep > 1 and not self._cut:
            dist.all_reduce(experts, group=mesh.expert_group)
        squares = experts + others
        if self._cut:
            dist.all_reduce(squares, group=mesh.data_group)
        if mesh.model_group.size() > 1:
            dist.all_reduce(squares, group=mesh.model_group)
        return squares.sqrt()

    def _squares(self, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        grads = (self._sums.share_of(param) for param in parameters)
        held = [g for g in grads if g is not None and g.numel()]
        return sum_of_squares(held, self._device)


def build_states(
    config: Config, part: TrainingModel | PipelineStage, mesh: Mesh
) -> tuple[GradientSums, MasterWeights | ShardedWeights]:
    """The sums of a part's gradients and the states that they update, cut over replicas if
    ``config`` says so. ``check`` builds them on fake tensors."""
    precision = config.precision
    dtype = torch.float32 if precision.separate_sums else precision.torch_dtype
    cut = cuts_states(config)
    sums = GradientSums(replica_groups(named_by_spec(part.spec, part), mesh), dtype, cut=cut)
    parameters, split = list(part.parameters()), splits_masters(config)
    if cut:
        return sums, ShardedWeights(parameters, sums, config.optim, split=split)
    return sums, MasterWeights(parameters, config.optim, split=split)


def _counted(state: PartState, mesh: Mesh) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters whose gradients this rank counts: experts shared out over replicas, and others."""
    held: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for param, named in state.parameters():
        if counts_here(state.spec, param, mesh):
            held[0 if shared_out(param, mesh) else 1].append(named)
    return held
