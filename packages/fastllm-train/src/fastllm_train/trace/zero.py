"""What DeepSpeed's ZeRO keeps and makes around a model, as plain tensors.

DeepSpeed's engine does not run on fake tensors; this follows its buffers (0.19, stages 0 to 2,
``contiguous_gradients``), and the test holds it against the real engine's, traced. The optimizer is
the real one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastllm_train.config import Config
from fastllm_train.deepspeed_config import effective_zero_stage, reduce_bucket
from fastllm_train.mesh import Mesh
from fastllm_train.optimizer import build_optimizer, parameter_groups
from fastllm_train.trace.tracer import MemoryTracer


class ZeroMemory:
    """Master weights, buckets, reduced gradients and moments of one rank."""

    def __init__(self, config: Config, mesh: Mesh, part: nn.Module, tracer: MemoryTracer) -> None:
        self._config, self._mesh, self._tracer = config, mesh, tracer
        self._stage = effective_zero_stage(config)[0]
        self._params = list(part.parameters())
        self._groups = parameter_groups(part.named_parameters(), config.optim.weight_decay)
        self._buckets: list[Tensor] = []
        self._reduced: list[Tensor] = []
        self._reducing = self._first = False
        tracer.phase = "optimizer"
        if self._stage == 0:
            self._optimizer = build_optimizer(config.optim, self._groups)
            return
        masters = [
            nn.Parameter(torch.zeros(self._partition(group["params"]), dtype=torch.float32))
            for group in self._groups
        ]
        self._masters = masters
        groups = [{**g, "params": [m]} for g, m in zip(self._groups, masters, strict=True)]
        self._optimizer = build_optimizer(config.optim, groups)
        for param in self._params:
            param.register_post_accumulate_grad_hook(self._gradient_ready)

    def before_backward(self, *, last: bool) -> None:
        """``last``: the step's last micro-batch. Stage 1 reduces in that one only."""
        self._reducing = last or self._stage == 2
        self._first = True

    def after_backward(self) -> None:
        """Stage 2 keeps what its share of the reduced gradients lies in, and no bucket."""
        if self._stage == 2:
            self._buckets = []

    def step(self) -> None:
        """The update, from reduced gradients to weights."""
        tracer = self._tracer
        tracer.phase = "optimizer step"
        if self._stage == 0:
            self._optimizer.step()
        else:
            for index, master in enumerate(self._masters):
                master.grad = self._reduced[index][: master.numel()].float()
            self._reduced = []
            self._buckets = []
            self._optimizer.step()
            for master in self._masters:
                master.grad = None
        for param in self._params:
            param.grad = None
        tracer.track(self._moments(), "optimizer")

    def _moments(self) -> list[Tensor]:
        return [
            value
            for state in self._optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        ]

    def _gradient_ready(self, param: Tensor) -> None:
        """Gradients are copied into the bucket and reduced from there: they themselves are not
        kept. The bucket is made with a backward pass's first gradient; stage 1's of the pass before
        lives on beside it."""
        if self._first:
            self._first = False
            phase, self._tracer.phase = self._tracer.phase, "gradients"
            size = reduce_bucket(self._config)
            self._buckets = [*self._buckets[-1:], torch.empty(size, dtype=param.dtype)]
            if self._reducing and not self._reduced:
                sizes = (self._reduced_size(group["params"]) for group in self._groups)
                self._reduced = [torch.empty(size, dtype=param.dtype) for size in sizes]
            self._tracer.phase = phase
        if self._reducing:
            param.grad = None

    def _reduced_size(self, params: list[Tensor]) -> int:
        """Elements kept of a group's reduced gradients: this rank's share; in stage 2 the whole
        gradients that it is a view of. (The traced rank is the first: its share comes first.)"""
        share = self._partition(params)
        if self._stage < 2:
            return share
        kept = 0
        for param in params:
            if kept >= share:
                break
            kept += param.numel()
        return kept

    def _partition(self, params: list[Tensor]) -> int:
        """Elements of this rank's share of a group of parameters."""
        parallel = self._mesh.parallel
        shared_out = any(hasattr(param, "group_name") for param in params)
        ranks = parallel.dp * parallel.cp // (parallel.ep if shared_out else 1)
        return -(-sum(param.numel() for param in params) // ranks)
