"""A step's micro-batches through this rank's part of the model, with any pipeline layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastllm_train.mesh import Mesh
from fastllm_train.pipeline.exchange import Exchange
from fastllm_train.pipeline.schedule import one_forward_one_backward
from fastllm_train.pipeline.tied import TiedEmbedding


class _Underway(NamedTuple):
    """A micro-batch between its passes. ``received``: the stage's input, if sent to it."""

    objective: Tensor
    received: Tensor | None


@dataclass(frozen=True)
class Runner:
    """``call`` runs the part (a ``TrainingModel``, or a ``PipelineStage`` where there are several),
    ``backward`` goes back from a scalar, ``done`` ends a micro-batch's backward pass (True: the
    step's last); ``lap`` hears which pass has just ended."""

    mesh: Mesh
    exchange: Exchange
    tied: TiedEmbedding | None
    call: Callable[..., Any]
    backward: Callable[[Tensor], object]
    done: Callable[[bool], None]
    lap: Callable[[str], None] = lambda _: None

    def run(self, micro_batches: Sequence[Sequence[Tensor]], scale: float) -> Tensor:
        """Every micro-batch (tokens, positions, labels, mask) forward and backward, losses times
        ``scale``. Returns the summed cross entropy, fp64, zero but on the last stage."""
        stages, stage = self.mesh.parallel.pp, self.mesh.at.pp
        total = torch.zeros((), dtype=torch.float64, device=micro_batches[0][0].device)
        underway: dict[int, _Underway] = {}
        for kind, index in one_forward_one_backward(stage, stages, len(micro_batches)):
            if kind == "forward":
                underway[index], loss = self._forward(micro_batches[index], scale)
                total += loss.double()
                self.lap("forward")
                continue
            last = index == len(micro_batches) - 1
            if last and self.tied is not None:
                self.tied.before_last_backward()
            objective, received = underway.pop(index)
            self.backward(objective)
            if last and self.tied is not None:
                # Before the gradient of the hidden states: with two stages both go to the same
                # one, which wants this first.
                self.tied.after_last_backward()
            self.exchange.send_gradient(received)
            self.lap("backward")
            self.done(last)
        return total

    def evaluate(self, micro_batches: Sequence[Sequence[Tensor]]) -> Tensor:
        """The same cross entropy, forward only."""
        total = torch.zeros((), dtype=torch.float64, device=micro_batches[0][0].device)
        with torch.no_grad():
            for tensors in micro_batches:
                total += self._forward(tensors, 1.0)[1].double()
        return total

    def _forward(self, tensors: Sequence[Tensor], scale: float) -> tuple[_Underway, Tensor]:
        # The product is a new tensor: DeepSpeed 0.19 without ZeRO divides the gradient by the
        # number of micro-batches when it goes back from the very tensor that the forward gave.
        if self.mesh.parallel.pp == 1:
            loss = self.call(*tensors)
            return _Underway(loss.objective * scale, None), loss.cross_entropy
        received = self.exchange.receive_hidden()
        out = self.call(received, *tensors, self.exchange.receive_gradient)
        self.exchange.send_hidden(out.hidden)
        return _Underway(out.objective * scale, received), out.cross_entropy
