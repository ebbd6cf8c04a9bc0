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
        if self._stage == 2:
            self._make_bucket()

    def step(self) -> None:
        """The update, from reduced gradients to weights."""
        tracer = self._tracer
        tracer.phase = "optimizer step"
        if self._stage == 0:
            self._optimizer.step()
        else:
            for index, master in enumerate(self._masters):
                master.grad = self._reduced[index].float()
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
        kept. The bucket of stage 1 is made with a backward pass's first gradient (stage 2: before,
        by measurement)."""
        if self._first:
            self._make_bucket()
        if self._reducing:
            param.grad = None

    def _make_bucket(self) -> None:
        """The bucket of the backward pass before lives on beside the new one."""
        self._first = False
        dtype = self._params[0].dtype
        phase, self._tracer.phase = self._tracer.phase, "gradients"
        self._buckets = [
            *self._buckets[-1:],
            torch.empty(reduce_bucket(self._config), dtype=dtype),
        ]
        if self._reducing and not self._reduced:
            self._reduced = [
                torch.empty(self._partition(group["params"]), dtype=dtype) for group in self._groups
            ]
        self._tracer.phase = phase

    def _partition(self, params: list[Tensor]) -> int:
        """Elements of this rank's share of a group of parameters."""
        parallel = self._mesh.parallel
        shared_out = any(hasattr(param, "group_name") for param in params)
        ranks = parallel.dp * parallel.cp // (parallel.ep if shared_out else 1)
        return -(-sum(param.numel() for param in params) // ranks)
