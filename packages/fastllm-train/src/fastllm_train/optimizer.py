"""The optimizer ([optim]): AdamW or SGD over two parameter groups, with and without decay."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from fastllm_train.errors import UserError

if TYPE_CHECKING:
    import torch


# By torch's names.
MOMENTS: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "sgd": ()}


@dataclass(frozen=True)
class OptimConfig:
    """``weight_decay`` is decoupled (Loshchilov & Hutter 2017, arXiv:1711.05101) and acts on
    matrices only. ``clip`` bounds the global 2-norm of the gradient; 0 turns clipping off.
    ``z_loss``: the coefficient of ``models.z_loss``; with one the head's logits are kept."""

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise UserError(f"optim.lr={self.lr} is not positive")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"optim.{name}={getattr(self, name)} is not in [0, 1)")
        for name in ("eps", "weight_decay", "clip", "z_loss"):
            if getattr(self, name) < 0:
                raise UserError(f"optim.{name}={getattr(self, name)} is negative")


def decays(shape: tuple[int, ...]) -> bool:
    """Matrices decay; norm weights and biases (one dimension) do not."""
    return len(shape) > 1


def parameter_groups(
    named: Iterable[tuple[str, torch.nn.Parameter]], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups in the model's order: decayed first, then the others, then each of these of experts
    that are shared out over ranks (DeepSpeed wants them apart, and reads ``moe`` and ``name``). An
    empty group is left out."""
    groups: dict[tuple[bool, str], list[torch.nn.Parameter]] = {}
    for _, param in named:
        # Under ZeRO-3 a parameter is an empty shard; ds_shape is its full shape.
        shape = tuple(getattr(param, "ds_shape", param.shape))
        key = (decays(shape), getattr(param, "group_name", ""))
        groups.setdefault(key, []).append(param)
    return [
        {
            "params": groups[decayed, name],
            "weight_decay": weight_decay if decayed else 0.0,
            **({"moe": True, "name": name} if name else {}),
        }
        for decayed, name in sorted(groups, key=lambda key: (key[1], not key[0]))
    ]


def build_optimizer(config: OptimConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """torch's fused AdamW (on CPU it runs at memory speed: docs/train.md), or plain SGD."""
    import torch

    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    betas = (config.beta1, config.beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def ask_before_update(optimizer: torch.optim.Optimizer, may_update: Callable[[], bool]) -> None:
    """From now on ``optimizer.step`` does nothing, not even decay weights, when ``may_update`` says
    no. DeepSpeed calls ``step`` when gradients are reduced and their norm is known, once for every
    partition."""
    step = optimizer.step

    def guarded(closure: Any = None) -> Any:
        return step(closure) if may_update() else None

    optimizer.step = guarded  # type: ignore[method-assign]
