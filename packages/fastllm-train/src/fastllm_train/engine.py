"""What the loop needs of a training engine; DeepSpeed is behind it in ``engine_deepspeed``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from fastllm_train.data import MicroBatch


@dataclass(frozen=True)
class StepOutcome:
    """One step, the same on every rank.

    ``loss``: token-weighted mean over the global batch, nats. ``grad_norm``: global 2-norm before
    clipping; NaN or infinite when a gradient is. ``stop``: some rank asked to stop. ``updated``:
    the weights were updated. ``loss_scale``: what fp16's loss was multiplied by (None: not fp16).
    ``phase_s``: this rank's seconds by phase.
    """

    loss: float
    grad_norm: float
    stop: bool
    phase_s: Mapping[str, float] = field(default_factory=dict)
    updated: bool = True
    loss_scale: float | None = None


# Whether a step with this loss, gradient norm and loss scale may update the weights.
Judge = Callable[[float, float, float | None], bool]


def accept_all(loss: float, grad_norm: float, loss_scale: float | None) -> bool:
    """The judge that lets every step through."""
    del loss, grad_norm, loss_scale
    return True


class Engine(Protocol):
    """A model under training on this rank. Every method is collective: all ranks call it."""

    def train_step(
        self,
        batches: Sequence[MicroBatch],
        lr: float,
        *,
        stop: bool,
        judge: Judge = accept_all,
    ) -> StepOutcome:
        """Forward, backward and, if ``judge`` says so, update over this rank's micro-batches of one
        step. ``judge`` gets the same numbers on every rank and must answer the same."""
        ...

    def evaluate(self, batches: Sequence[MicroBatch]) -> tuple[float, float]:
        """Without learning from them: (Σ weight * loss, Σ weight) over the tokens of all ranks'
        micro-batches, the same on every rank."""
        ...

    def save(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Write this rank's part of a checkpoint and ``state`` under ``folder``."""
        ...

    def snapshot(self, state: Mapping[str, Any]) -> Callable[[Path], None]:
        """A copy of the training state in host memory, as the function that writes this rank's
        files of it into a folder: not collective, and free to run in another thread."""
        ...

    def load(self, folder: Path) -> dict[str, Any]:
        """Restore a checkpoint, of any layout if it is portable; returns the ``state`` it was
        saved with. Also in the middle of a run, to go back."""
        ...

    def master_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(canonical name, whole fp32 tensor on CPU), in the model's order, on every rank."""
        ...
