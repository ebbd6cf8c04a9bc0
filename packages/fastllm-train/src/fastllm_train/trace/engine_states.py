"""What the torch engine keeps and makes around a model: its own parts, run on fake tensors."""

from __future__ import annotations

import torch

from fastllm_train.config import Config
from fastllm_train.engine_torch import build_states
from fastllm_train.mesh import Mesh
from fastllm_train.models.decoder import TrainingModel
from fastllm_train.pipeline.stage import PipelineStage
from fastllm_train.trace.tracer import MemoryTracer


class TorchEngineMemory:
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
        self._sums, self._states = build_states(config, part, mesh)
        tracer.track(self._sums.buffers(), "gradients")
        tracer.track(part.parameters(), "weights")  # where they are now

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
