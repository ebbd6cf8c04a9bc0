"""What neighbouring stages send each other: hidden states on, their gradients back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastllm_train.mesh import Mesh


class Exchange:
    """Messages of one stage. Every activation has ``shape`` and ``dtype``.

    Sends do not wait; what is sent is kept until it has left.
    """

    def __init__(
        self, mesh: Mesh, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._mesh, self._shape, self._dtype, self._device = mesh, shape, dtype, device
        self._underway: list[tuple[dist.Work, Tensor]] = []

    def receive_hidden(self) -> Tensor | None:
        """From the stage before; None on the first. The gradient is wanted."""
        if self._mesh.first_stage:
            return None
        hidden = self._empty(self._shape, self._dtype)
        self._receive(hidden, -1, self._mesh.forward_group)
        return hidden.requires_grad_()

    def send_hidden(self, hidden: Tensor) -> None:
        """To the next stage, if there is one."""
        if not self._mesh.last_stage:
            self._send(hidden, 1, self._mesh.forward_group)

    def receive_gradient(self) -> Tensor:
        """Of what was sent, from the next stage."""
        grad = self._empty(self._shape, self._dtype)
        self._receive(grad, 1, self._mesh.backward_group)
        return grad

    def send_gradient(self, hidden: Tensor | None) -> None:
        """Of what ``receive_hidden`` gave, to the stage before."""
        if hidden is not None:
            assert hidden.grad is not None
            self._send(hidden.grad, -1, self._mesh.backward_group)

    def tied_gradient(self, grad: Tensor) -> None:
        """From the last stage, which sends ``grad``, into the first one's ``grad``."""
        self._between_ends(grad, from_last=True, group=self._mesh.backward_group)

    def tied_weight(self, weight: Tensor) -> None:
        """From the first stage, which sends ``weight``, into the last one's ``weight``."""
        self._between_ends(weight, from_last=False, group=self._mesh.forward_group)

    def finish(self) -> None:
        """Wait until everything has left."""
        for work, _ in self._underway:
            work.wait()
        self._underway.clear()

    def _between_ends(self, tensor: Tensor, *, from_last: bool, group: dist.ProcessGroup) -> None:
        stages = self._mesh.parallel.pp
        if self._mesh.last_stage == from_last:
            self._send(tensor, (1 - stages) if from_last else stages - 1, group)
        else:
            self._receive(tensor, (stages - 1) if from_last else 1 - stages, group)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self._device)

    def _peer(self, offset: int) -> int:
        at = self._mesh.at
        return self._mesh.parallel.rank_of(at._replace(pp=at.pp + offset))

    def _send(self, tensor: Tensor, offset: int, group: dist.ProcessGroup) -> None:
        tensor = tensor.detach().contiguous()
        work = dist.isend(tensor, self._peer(offset), group=group)
        assert work is not None
        self._underway = [(w, t) for w, t in self._underway if not w.is_completed()]
        self._underway.append((work, tensor))

    def _receive(self, into: Tensor, offset: int, group: dist.ProcessGroup) -> None:
        dist.recv(into, self._peer(offset), group=group)
