"""What the torch engine keeps and makes around a model: its own parts, run on fake tensors."""

from __future__ import annotations

import torch

from fastllm_train.config import Config
from fastllm_train.engine_choice import splits_masters
from fastllm_train.engine_state import named_by_spec
from fastllm_train.gradient_sums import GradientSums, replica_groups
from fastllm_train.master_weights import MasterWeights
from fastllm_train.mesh import Mesh
from fastllm_train.models.decoder import TrainingModel
from fastllm_train.pipeline.stage import PipelineStage
from fastllm_train.trace.tracer import MemoryTracer


class WholeStatesMemory:
    """Master weights, moments and sums of gradients of one rank; as ``ZeroMemory``."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        part: TrainingModel | PipelineStage,
        tracer: MemoryTracer,
    ) -> None:
        self._tracer, self._clip = tracer, config.optim.clip
        tracer.phase = "optimizer"
        split = splits_masters(config)
        self._states = MasterWeights(list(part.parameters()), config.optim, split=split)
        tracer.phase = "gradients"
        precision = config.precision
        dtype = torch.float32 if precision.separate_sums else precision.torch_dtype
        parameters = named_by_spec(part.spec, part)
        self._sums = GradientSums(replica_groups(parameters, mesh), dtype)

    def before_backward(self, *, last: bool) -> None:
        self._sums.before_backward(last=last)

    def after_backward(self) -> None:
        """Nothing is made or freed."""

    def step(self) -> None:
        """The update, from summed gradients to weights. (Its norm and clipping are scalars.)"""
        self._tracer.phase = "optimizer step"
        self._sums.finish()
        scale = torch.ones(()) if self._clip else None
        self._states.update(self._sums.of, 1e-4, scale)
        self._sums.clear()
