"""DeepSpeed behind ``Engine``: ZeRO 0-3, offload, its own checkpoint layout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fastllm_planner.arch import ArchSpec, ParamSpec
from fastllm_train import deepspeed_nvme
from fastllm_train.checkpoint import written_format
from fastllm_train.config import Config
from fastllm_train.context_parallel import cut_context
from fastllm_train.data import MicroBatch
from fastllm_train.deepspeed_config import deepspeed_config, effective_zero_stage
from fastllm_train.deepspeed_setup import (
    allow_fp16_on_cpu,
    import_deepspeed,
    take_over_process_group,
    torch_writes,
)
from fastllm_train.deepspeed_states import EngineStates
from fastllm_train.engine import Judge, StepOutcome, accept_all
from fastllm_train.engine_state import PartState
from fastllm_train.engine_step import StepClock, any_rank, batch_tensors, global_sum, global_weight
from fastllm_train.expert_parallel import mark_experts
from fastllm_train.mesh import build_mesh
from fastllm_train.model_part import (
    activation_shape,
    build_part,
    materialise,
    owners,
    tie_ends,
    whole_model,
)
from fastllm_train.models.decoder import TrainingModel
from fastllm_train.models.initialise import initialise
from fastllm_train.optimizer import MOMENTS, ask_before_update, build_optimizer, parameter_groups
from fastllm_train.pipeline.exchange import Exchange
from fastllm_train.pipeline.run import Runner
from fastllm_train.pipeline.stage import PipelineStage
from fastllm_train.portable import PortableCheckpoint, is_portable
from fastllm_train.tensor_parallel.apply import cut_to_rank, mark_counted

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
        take_over_process_group(deepspeed)
        if config.precision.dtype == "fp16" and device == "cpu":
            allow_fp16_on_cpu()
        self._spec = spec
        self._start = start
        self._progress = progress
        self._portable = written_format(config) == "portable"
        self._device = torch.device(device)
        self._stage, _ = effective_zero_stage(config)
        if config.parallel.nvme_path:
            deepspeed_nvme.prepare(config)
        self._norm: float | None = None  # of a step without ZeRO
        self._updates = 0  # how often the optimizer has stepped
        self._verdict: bool | None = None  # on the step under way
        self._judge: Callable[[], bool] = lambda: True
        self._seed, self._weights = config.run.seed, weights
        self._gather: Callable[[torch.nn.Parameter], Any] | None = None  # ZeRO-3's shards
        self._mesh = build_mesh(config.parallel)
        settings = deepspeed_config(config)
        self._model: TrainingModel | PipelineStage
        self._model, tied_copy = self._build(config, settings)
        shape, dtype = activation_shape(config, spec), config.precision.torch_dtype
        self._exchange = Exchange(self._mesh, shape, dtype, self._device)
        self._tied = tie_ends(self._model, tied_copy, self._mesh, self._exchange)
        if self._tied is not None:
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
        moments = MOMENTS[config.optim.name]
        self._states = EngineStates(self._engine, self._stage, moments)
        self._states.never_give_up_scaling()
        whole = (self._device, self._model, self._states, owners(config, spec), moments)
        self._state = PartState(spec, self._mesh, *whole)

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
        clock = StepClock(self._progress)
        tensors = [self._tensors(batch) for batch in batches]
        weight = max(global_weight(tensors, self._mesh, self._device), 1.0)
        # DeepSpeed averages over the ranks of the data group; this makes it the global mean.
        scale = parallel.dp * parallel.cp / weight
        self._norm, self._verdict = None, None
        loss_scale = self._states.loss_scale
        step = _Step(lr, len(tensors), clock)

        def end_backward(last: bool) -> None:
            if last:
                step.loss = self._sum(step.total) / weight
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
        asked = any_rank(stop, self._device)
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
        return self._sum(total), global_weight(tensors, self._mesh, self._device)

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

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        if not self._portable:
            rng = {"rng": torch.get_rng_state()}
            with torch_writes(folder.parent):
                self._engine.save_checkpoint(
                    str(folder.parent),
                    tag=folder.name,
                    client_state={STATE_KEY: {**self._complete(state), **rng}},
                    save_latest=False,
                )
            return
        self.snapshot(state)(folder)

    def snapshot(self, state: Mapping[str, Any]) -> Callable[[Path], None]:
        return self._state.snapshot(self._complete(state))

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
        return self._state.master_parameters()

    def _load_portable(self, folder: Path) -> dict[str, Any]:
        start = self._start
        if start is None or start.folder != folder:  # going back in the middle of a run
            start = PortableCheckpoint(folder, self._spec)
            self._fill(start.weight)
        self._start = None
        self._state.restore(start)
        if self._tied is not None:
            self._tied.share_weight()
            self._exchange.finish()
        return start.state

    def _tensors(self, batch: MicroBatch) -> list[torch.Tensor]:
        return batch_tensors(batch, self._mesh, self._device)

    def _sum(self, total: torch.Tensor | float) -> float:
        return global_sum([float(total)], self._mesh, self._device)[0]

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
    clock: StepClock
    loss: float = 0.0
    total: torch.Tensor | float = 0.0

    def counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, whose result's cross entropy is added up."""

        def counted(*arguments: Any) -> Any:
            result = call(*arguments)
            self.total = self.total + result.cross_entropy.double()
            return result

        return counted
