"""fp32 weights and optimizer moments of a rank's parameters, and the step that updates them.

AdamW is ``ops.adamw``: one pass over memory that clips, updates and writes the weight in the
model's type. States lie in flat buffers that live as long as the run. A bf16 weight is the upper
half of its master where masters are split: then only the lower halves are kept beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastllm_train.ops.adamw import adamw_, joined, split_
from fastllm_train.optimizer import MOMENTS, OptimConfig, decays

T = TypeVar("T")


class MasterWeights:
    """``States`` (engine_state) of ``parameters``. fp32 parameters are their own masters. With
    ``split`` the parameters are bf16, and ``_masters`` the int16 lower halves (``ops.adamw``).
    ``decayed``: which of them weight decay is for, if their shapes do not say."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        config: OptimConfig,
        *,
        split: bool,
        decayed: Sequence[bool] | None = None,
    ) -> None:
        self._parameters, self._config, self._split = list(parameters), config, split
        if decayed is None:
            decayed = [decays(tuple(p.shape)) for p in self._parameters]
        self._decayed = dict(zip(self._parameters, decayed, strict=True))
        self.steps = 0
        own = [p.detach() for p in self._parameters]
        self._separate = bool(own) and own[0].dtype != torch.float32
        masters = _like(own, torch.int16 if split else torch.float32) if self._separate else own
        self._masters = dict(zip(self._parameters, masters, strict=True))
        self._moments = {
            key: dict(zip(self._parameters, _like(own, torch.float32), strict=True))
            for key in MOMENTS[config.name]
        }
        self.take_from_model()

    def take_from_model(self) -> None:
        """Masters become what the model's weights are."""
        for param, master in self._masters.items():
            if self._split:
                master.zero_()
            elif self._separate:
                master.copy_(param.detach())

    def update(
        self,
        gradient: Callable[[nn.Parameter], Tensor | None],
        lr: float,
        grad_scale: Tensor | None,
    ) -> None:
        """One step. A gradient that is None counts as zero; ``grad_scale`` [1] multiplies all."""
        self.steps += 1
        step = self._adamw if self._config.name == "adamw" else self._sgd
        with torch.no_grad():
            for param in self._parameters:
                grad = gradient(param)
                step(param, torch.zeros_like(param) if grad is None else grad, lr, grad_scale)

    def _adamw(self, param: nn.Parameter, grad: Tensor, lr: float, scale: Tensor | None) -> None:
        config = self._config
        adamw_(
            self._masters[param],
            grad,
            self._moments["exp_avg"][param],
            self._moments["exp_avg_sq"][param],
            lr=lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=self._decay(param),
            step=self.steps,
            grad_scale=scale,
            model=param.detach() if self._separate else None,
        )

    def _sgd(self, param: nn.Parameter, grad: Tensor, lr: float, scale: Tensor | None) -> None:
        """As torch.optim.SGD: the decay is added to the gradient."""
        master, wide = self.weight(param), grad.float()
        if scale is not None:
            wide = wide * scale
        if self._decay(param):
            wide = wide.add(master, alpha=self._decay(param))
        self._set(param, master.add_(wide, alpha=-lr))

    def _set(self, param: nn.Parameter, master: Tensor) -> None:
        """The master's value, and the weight's."""
        if self._split:
            split_(master, param.detach(), self._masters[param])
            return
        self._masters[param].copy_(master)
        if self._separate:
            param.detach().copy_(master)

    def _decay(self, param: nn.Parameter) -> float:
        return self._config.weight_decay if self._decayed[param] else 0.0

    def visit(
        self, parameters: Iterable[tuple[T, nn.Parameter]], *, write: bool = False
    ) -> Iterator[tuple[T, nn.Parameter]]:
        """In their order: all states are in memory."""
        del write
        return iter(parameters)

    def weight(self, param: nn.Parameter) -> Tensor:
        """The master; made anew where it is split."""
        master = self._masters[param]
        return joined(param.detach(), master) if self._split else master

    def moments(self, param: nn.Parameter) -> dict[str, Tensor]:
        return {key: held[param] for key, held in self._moments.items()}

    def link(self) -> None:
        """Nothing: moments are there from the start."""

    def begin_restore(self, optimizer_steps: int) -> None:
        self.steps = optimizer_steps

    def restore(self, param: nn.Parameter, weight: Tensor, moments: Mapping[str, Tensor]) -> None:
        self._set(param, weight.float())
        for key, value in moments.items():
            self._moments[key][param].copy_(value)


def write_weight(master: Tensor, weight: Tensor, *, split: bool) -> None:
    """The model's ``weight`` becomes the fp32 ``master``, rounded as an update rounds it."""
    if split:
        split_(master.float().contiguous(), weight, torch.empty_like(weight, dtype=torch.int16))
    else:
        weight.copy_(master)


def _like(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Zeros of these shapes, in one buffer."""
    step = 64 // dtype.itemsize  # elements: views begin on cache lines
    sizes = [-(-t.numel() // step) * step for t in tensors]
    device: Any = tensors[0].device if tensors else None
    flat = torch.zeros(sum(sizes), dtype=dtype, device=device)
    parts = flat.split(sizes)
    return [part[: t.numel()].view(t.shape) for part, t in zip(parts, tensors, strict=True)]
