"""An embedding that is also the head, with both ends on different stages.

The first stage's optimizer owns the weight. The last stage computes with a copy; the gradient that
the copy collects goes to the first stage once a step and joins the embedding's in the backward pass
of its last micro-batch, so that it is reduced, clipped and counted like any other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm_train.mesh import Mesh
from fastllm_train.pipeline.exchange import Exchange


class TiedEmbedding:
    """``embedding``: the parameter, on the first stage; ``copy``: on the last. None elsewhere."""

    def __init__(
        self, mesh: Mesh, exchange: Exchange, embedding: Tensor | None, copy: Tensor | None
    ) -> None:
        assert (embedding is not None) == mesh.first_stage
        assert (copy is not None) == mesh.last_stage
        self._exchange, self._embedding, self._copy = exchange, embedding, copy
        self._arrived: Tensor | None = None
        if embedding is not None:
            embedding.register_hook(self._add)

    def share_weight(self) -> None:
        """From the parameter to the copy: at the start and after every update."""
        for end in (self._embedding, self._copy):
            if end is not None:
                self._exchange.tied_weight(end.data)

    def before_last_backward(self) -> None:
        """The last stage has run all its backward passes by the time the first runs its last."""
        if self._embedding is not None:
            self._arrived = torch.empty_like(self._embedding)
            self._exchange.tied_gradient(self._arrived)

    def after_last_backward(self) -> None:
        self._arrived = None
        if self._copy is not None:
            assert self._copy.grad is not None
            self._exchange.tied_gradient(self._copy.grad)
            self._copy.grad = None

    def _add(self, grad: Tensor) -> Tensor:
        return grad if self._arrived is None else grad + self._arrived
