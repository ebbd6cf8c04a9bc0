"""Weights from scratch, the same for every layout.

Each tensor is drawn whole from a generator seeded by (seed, its canonical name), so neither the
order of construction nor the way a model is split over ranks changes a value.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from fastllm_planner.arch import ArchSpec, ParamSpec, iter_params


def initial_value(spec: ArchSpec, param: ParamSpec, seed: int) -> torch.Tensor:
    """fp32 CPU tensor of ``param.shape``.

    Matrices are normal(0, init_std); the two projections that write into the residual stream are
    divided by sqrt(2*layers) (GPT-2: Radford et al. 2019, section 2.3). Norm weights are one,
    biases zero.
    """
    if param.name.endswith(".bias"):
        return torch.zeros(param.shape)
    if param.role == "norm":
        return torch.ones(param.shape)
    std = spec.init_std
    if param.role in ("attention_out", "mlp_down"):
        std /= math.sqrt(2 * spec.layers)
    digest = hashlib.sha256(f"{seed}:{param.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(param.shape).normal_(0.0, std, generator=generator)


Gather = Callable[[torch.nn.Parameter], AbstractContextManager[object]]
Cut = Callable[[ParamSpec, torch.Tensor], torch.Tensor]


def initialise(
    model: torch.nn.Module,
    spec: ArchSpec,
    seed: int,
    gather: Gather | None = None,
    cut: Cut | None = None,
    value_of: Callable[[ParamSpec], torch.Tensor] | None = None,
) -> None:
    """Fill every parameter of ``model``, from ``value_of`` (whole tensors of a checkpoint) or, by
    default, at random. ``gather`` makes a ZeRO-3 shard whole and writable;
    ``cut`` takes this rank's part of a whole value (tensor parallelism)."""
    by_name = {p.name: p for p in iter_params(spec)}
    whole = gather if gather is not None else lambda _: nullcontext()
    with torch.no_grad():
        for name, param in model.named_parameters():
            with whole(param):
                param_spec = by_name[name]
                value = value_of(param_spec) if value_of else initial_value(spec, param_spec, seed)
                param.copy_(value if cut is None else cut(by_name[name], value))
