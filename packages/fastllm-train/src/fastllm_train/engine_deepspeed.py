"""DeepSpeed behind ``Engine``: ZeRO 0-3, offload, its own checkpoint layout."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from fastllm_planner.arch import ArchSpec, ParamSpec, iter_params
from fastllm_train.checkpoint import written_format
from fastllm_train.config import Config
from fastllm_train.context_parallel import cut_context, part_of_sequence
from fastllm_train.data import MicroBatch
from fastllm_train.deepspeed_config import deepspeed_config, effective_zero_stage
from fastllm_train.deepspeed_setup import allow_fp16_on_cpu, import_deepspeed, torch_writes
from fastllm_train.deepspeed_states import MOMENTS, EngineStates
from fastllm_train.engine import Judge, StepOutcome, accept_all
from fastllm_train.expert_parallel import mark_experts
from fastllm_train.mesh import build_mesh
from fastllm_train.model_part import (
    activation_shape,
    build_part,
    embedding_weight,
    materialise,
    owners,
    whole_model,
)
from fastllm_train.models.decoder import TrainingModel
from fastllm_train.models.initialise import initialise
from fastllm_train.optimizer import ask_before_update, build_optimizer, parameter_groups
from fastllm_train.pipeline.exchange import Exchange
from fastllm_train.pipeline.run import Runner
from fastllm_train.pipeline.stage import PipelineStage
from fastllm_train.pipeline.tied import TiedEmbedding
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
    mark_counted,
)

STATE_KEY = "fastllm"


class DeepSpeedEngine:
    """See ``Engine``. Each rank's part of the model is a module of DeepSpeed's plain engine; the
    pipeline's schedule is ours."""

    def __init__(
        self,
        config: Config,
        spec: ArchSpec,
        device: str,
        start: PortableCheckpoint | None = None,
        weights: Callable[[ParamSpec], torch.Tensor] | None = None,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """``start``: a portable checkpoint to take the weights from; ``load`` it afterwards.
        ``weights``: whole tensors to start a new run from (None: drawn at random). ``progress``
        hears of every part of a step that is done."""
        deepspeed = import_deepspeed(device)
        if config.precision.dtype == "fp16" and device == "cpu":
            allow_fp16_on_cpu()
        self._spec = spec
        self._start = start
        self._progress = progress
        self._optimizer_name = config.optim.name
        self._portable = written_format(config.checkpoint, config.parallel) == "portable"
        self._device = torch.device(device)
        self._stage, _ = effective_zero_stage(config)
        self._norm: float | None = None  # of a step without ZeRO
        self._updates = 0  # how often the optimizer has stepped
        self._verdict: bool | None = None  # on the step under way
        self._judge: Callable[[], bool] = lambda: True
        self._seed, self._weights = config.run.seed, weights
        self._gather: Callable[[torch.nn.Parameter], Any] | None = None  # ZeRO-3's shards
        self._mesh = build_mesh(config.parallel)
        self._owners = owners(config, spec)
        settings = deepspeed_config(config)
        self._model: TrainingModel | PipelineStage
        self._model, tied_copy = self._build(config, settings)
        shape, dtype = activation_shape(config, spec), config.precision.torch_dtype
        self._exchange = Exchange(self._mesh, shape, dtype, self._device)
        self._tied: TiedEmbedding | None = None
        if spec.tied_embeddings and config.parallel.pp > 1:
            embedding = embedding_weight(self._model)
            self._tied = TiedEmbedding(self._mesh, self._exchange, embedding, tied_copy)
            self._tied.share_weight()
        groups = parameter_groups(self._model.named_parameters(), config.optim.weight_decay)
        optimizer = build_optimizer(config.optim, groups)
        ask_before_update(optimizer, self._may_update)
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=self._model,
            optimizer=optimizer,
            config=settings,
            mpu=self._mesh,
            dist_init_required=False,
        )
        self._states = EngineStates(self._engine, self._stage, MOMENTS[config.optim.name])
        self._states.never_give_up_scaling()

    def _build(
        self, config: Config, settings: dict[str, Any]
    ) -> tuple[TrainingModel | PipelineStage, torch.Tensor | None]:
        """This rank's part with its initial weights, on its device and in its dtype; and the copy
        of ``materialise``."""
        import deepspeed

        spec, mesh, parallel = self._spec, self._mesh, config.parallel
        copy: torch.Tensor | None = None
        if self._stage == 3 and parallel.tp == 1:
            # Modules are sharded as they are made; with tensor parallelism they are cut first.
            # No dtype argument: where fp16 is unsupported (CPU), DeepSpeed 0.19 takes bf16 whatever
            # it says (`dtype or fp16 if supported else bf16`); the configuration it reads right.
            with deepspeed.zero.Init(config_dict_or_path=settings):
                model = whole_model(config, spec)
            if parallel.cp > 1:
                cut_context(model.model, mesh)
            gathered = deepspeed.zero.GatheredParameters
            self._gather = lambda p: gathered([p], modifier_rank=0)
        else:
            model = build_part(config, spec, mesh)
            copy = materialise(model, self._device, config.precision.torch_dtype)
            mark_counted(model, spec, mesh)
            if parallel.ep > 1:
                model.expert_groups = mark_experts(model, mesh)
        self._model = model
        self._fill(self._weights if self._start is None else self._start.weight)
        return model.to(device=self._device, dtype=config.precision.torch_dtype), copy

    def _fill(self, value: Callable[[ParamSpec], torch.Tensor] | None) -> None:
        """Set the model's weights, from whole tensors or (None) at random."""
        cut = partial(cut_to_rank, self._spec, self._mesh)
        initialise(self._model, self._spec, self._seed, self._gather, cut, value)

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
        parallel = self._mesh.parallel
        clock = _Clock(self._progress)
        tensors = [self._tensors(batch) for batch in batches]
        weight = max(self._weight(tensors), 1.0)
        # DeepSpeed averages over the ranks of the data group; this makes it the global mean.
        scale = parallel.dp * parallel.cp / weight
        self._norm, self._verdict = None, None
        loss_scale = self._states.loss_scale
        step = _Step(lr, len(tensors), clock)

        def end_backward(last: bool) -> None:
            if last:
                step.loss = self._global_sum([float(step.total)])[0] / weight
                self._judge = lambda: judge(step.loss, self._grad_norm(), loss_scale)
            self._end_backward(step, last)

        runner = self._runner(
            call=step.counting(self._engine),
            backward=partial(self._backward, step),
            done=end_backward,
            lap=clock.lap,
        )
        runner.run(tensors, scale)
        if self._tied is not None:
            self._tied.share_weight()
        self._exchange.finish()
        updated = bool(self._verdict) and not self._overflowed()
        self._updates += updated
        asked = self._any_rank(stop)
        clock.lap("optimizer")
        norm = self._grad_norm()
        return StepOutcome(step.loss, norm, asked, clock.seconds, updated, loss_scale)

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, float]:
        tensors = [self._tensors(batch) for batch in batches]
        self._engine.eval()
        runner = self._runner(self._engine, lambda _: None, lambda _: None, lambda _: None)
        total = runner.evaluate(tensors)
        self._exchange.finish()
        self._engine.train()
        return self._global_sum([float(total)])[0], self._weight(tensors)

    def _runner(
        self,
        call: Callable[..., Any],
        backward: Callable[[torch.Tensor], object],
        done: Callable[[bool], None],
        lap: Callable[[str], None],
    ) -> Runner:
        return Runner(self._mesh, self._exchange, self._tied, call, backward, done, lap)

    def _backward(self, step: _Step, objective: torch.Tensor) -> None:
        """DeepSpeed reduces and updates in the step's last micro-batch, of which there may be
        another number in the next step."""
        step.left -= 1
        self._engine.set_gradient_accumulation_boundary(step.left == 0)
        self._engine.backward(objective, scale_wrt_gas=False)

    def _end_backward(self, step: _Step, last: bool) -> None:
        """After the last micro-batch DeepSpeed updates the weights, if it may."""
        if last:
            for group in self._optimizer.param_groups:
                group["lr"] = step.lr
            if self._stage == 0:
                self._norm = self._norm_of_gradients()
        self._engine.step()
        if last and self._verdict is None:
            self._may_update()  # DeepSpeed left the update out itself: the judge still hears of it
        step.clock.lap("optimizer")

    def _may_update(self) -> bool:
        """Asked once a partition of the weights; the judge is asked once a step."""
        if self._verdict is None:
            self._verdict = self._judge()
        return self._verdict

    def _grad_norm(self) -> float:
        """Of the step's gradients, when they are reduced."""
        if self._norm is not None:
            return self._norm
        if self._overflowed():
            return math.inf
        # Not the engine's: that is the step's before until the update is over.
        norm = float(self._engine.optimizer._global_grad_norm)
        return norm if norm >= 0 else math.nan  # -1 is DeepSpeed's word for a norm that is none

    def _overflowed(self) -> bool:
        """DeepSpeed left the update out because a gradient is not finite."""
        return bool(getattr(self._engine.optimizer, "overflow", False))

    def _weight(self, tensors: Sequence[Sequence[torch.Tensor]]) -> float:
        """Σ of the loss mask over the global batch."""
        return self._global_sum([sum(float(t[3].sum()) for t in tensors)])[0]

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        if not self._portable:
            rng = {"rng": torch.get_rng_state()}
            with torch_writes():
                self._engine.save_checkpoint(
                    str(folder.parent),
                    tag=folder.name,
                    client_state={STATE_KEY: {**self._complete(state), **rng}},
                    save_latest=False,
                )
            return
        self.snapshot(state)(folder)

    def snapshot(self, state: Mapping[str, Any]) -> Callable[[Path], None]:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        state = self._complete(state)
        share = [s for s in self._whole_states() if self._owners[s.name] == rank]

        def write(folder: Path) -> None:
            write_share(folder, share, rank, world_size)
            if rank == 0:
                write_description(folder, self._spec, state, self._owners, world_size)

        return write

    def _complete(self, state: Mapping[str, Any]) -> dict[str, Any]:
        scaler = self._states.loss_scaler_state()
        return {**state, "optimizer_steps": self._updates, "loss_scaler": scaler}

    def load(self, folder: Path) -> dict[str, Any]:
        state = self._load(folder)
        self._updates = int(state.get("optimizer_steps", state["step"]))
        self._states.restore_loss_scaler(state.get("loss_scaler", {}))
        return state

    def _load(self, folder: Path) -> dict[str, Any]:
        if is_portable(folder):
            return self._load_portable(folder)
        path, state = self._engine.load_checkpoint(str(folder.parent), tag=folder.name)
        if path is None or STATE_KEY not in state:
            raise RuntimeError(f"DeepSpeed could not load {folder}")
        torch.set_rng_state(state[STATE_KEY]["rng"])
        if self._tied is not None:
            self._tied.share_weight()
            self._exchange.finish()
        return state[STATE_KEY]

    def master_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        held = {p.name: self._joined(p, self._states.weight(v)) for p, v in self._parameters()}
        for param in iter_params(self._spec):
            if param.tied_to is None:
                whole = held.get(param.name)
                if whole is None:
                    whole = torch.empty(param.shape)
                if self._mesh.parallel.pp > 1 or self._mesh.parallel.ep > 1:
                    whole = whole.to(self._device)
                    dist.broadcast(whole, src=self._owners[param.name])
                yield param.name, whole.cpu()

    def _load_portable(self, folder: Path) -> dict[str, Any]:
        start = self._start
        if start is None or start.folder != folder:  # going back in the middle of a run
            start = PortableCheckpoint(folder, self._spec)
            self._fill(start.weight)
        self._start, state = None, start.state
        self._states.begin_restore(state.get("optimizer_steps", state["step"]))
        for param, named in self._parameters():
            moments = start.moments(param, MOMENTS[self._optimizer_name])
            values = {
                key: cut_to_rank(self._spec, self._mesh, param, value).to(self._device)
                for key, value in moments.items()
            }
            weight = cut_to_rank(self._spec, self._mesh, param, start.weight(param))
            self._states.restore(named, weight.to(self._device), values)
        if self._tied is not None:
            self._tied.share_weight()
            self._exchange.finish()
        return state

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

    def _tensors(self, batch: MicroBatch) -> list[torch.Tensor]:
        """Tokens, positions, labels and mask of this rank's part of the sequences."""
        arrays = (batch.tokens, batch.position_ids, batch.labels, batch.loss_mask)
        return [
            torch.from_numpy(np.ascontiguousarray(part_of_sequence(a, self._mesh))).to(
                self._device, non_blocking=True
            )
            for a in arrays
        ]

    def _global_sum(self, values: Sequence[float]) -> list[float]:
        """Sums over tokens: the last stage's ranks have them, tensor-parallel ones in copies."""
        counts = self._mesh.last_stage and self._mesh.tp_rank == 0
        packed = torch.tensor(values, dtype=torch.float64, device=self._device) * counts
        dist.all_reduce(packed)
        return packed.tolist()

    def _any_rank(self, asked: bool) -> bool:
        flag = torch.tensor(float(asked), device=self._device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def _norm_of_gradients(self) -> float:
        """ZeRO-0 reports no norm. The gradients are already reduced over the replicas; of a tensor
        that tensor-parallel ranks hold in copies, one rank's counts."""
        squares = torch.zeros((), dtype=torch.float64, device=self._device)
        for param in self._model.parameters():
            if param.grad is not None and hasattr(param, "model_parallel"):
                squares += torch.linalg.vector_norm(param.grad, dtype=torch.float32).double() ** 2
        dist.all_reduce(squares, group=self._mesh.model_group)
        return math.sqrt(float(squares))


@dataclass
class _Step:
    """A step under way on this rank: ``total`` is its summed cross entropy so far, ``left`` its
    micro-batches to go back through."""

    lr: float
    left: int
    clock: _Clock
    loss: float = 0.0
    total: torch.Tensor | float = 0.0

    def counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, whose result's cross entropy is added up."""

        def counted(*arguments: Any) -> Any:
            result = call(*arguments)
            self.total = self.total + result.cross_entropy.double()
            return result

        return counted


class _Clock:
    """Seconds per phase; on CUDA a phase's end is its kernels' end only at the step's end."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
        self._progress(phase)
