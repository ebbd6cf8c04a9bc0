"""One rank of the fp64 test: each variant's sharded model against the whole one, in this process.

Usage: tensor_parallel_worker.py OUT.json; writes the largest relative errors, by variant.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from train_layouts import TINY

from fastllm_planner.arch import ArchSpec, iter_params, spec_from_dict
from fastllm_train.layout import ParallelConfig
from fastllm_train.mesh import Mesh, build_mesh
from fastllm_train.models.decoder import Decoder, TrainingModel
from fastllm_train.models.initialise import initialise
from fastllm_train.tensor_parallel import apply, layers
from fastllm_train.tensor_parallel.apply import cut_to_rank, join_from_ranks, parallelise

VARIANTS: dict[str, dict[str, Any]] = {
    "llama, 2 key heads": {},
    "llama, 1 key head": {"kv_heads": 1},
    "biases": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "qwen3, tied": {"family": "qwen3", "qk_norm": True, "tied_embeddings": True},
    "mistral": {"family": "mistral", "sliding_window": 8},
    "gpt2": {
        "family": "gpt2",
        "kv_heads": 4,
        "mlp": "gelu",
        "norm": "layernorm",
        "position": "learned",
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tied_embeddings": True,
    },
    "baichuan 13b": {
        "family": "baichuan",
        "kv_heads": 4,
        "position": "alibi",
        "norm_head": True,
    },
}


def model_of(spec: ArchSpec, recompute: str, mesh: Mesh | None, sequence: bool) -> TrainingModel:
    """Weights in fp64; norms and biases off their initial ones and zeros, so that each matters."""
    model = TrainingModel(Decoder(spec, recompute=recompute)).double()
    cut = None
    if mesh is not None:
        parallelise(model, spec, mesh, sequence_parallel=sequence)
        cut = partial(cut_to_rank, spec, mesh)
    initialise(model, spec, 1, cut=cut)
    by_name = {p.name: p for p in iter_params(spec)}
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                whole = torch.linspace(-0.2, 0.3, by_name[name].shape[0], dtype=torch.float64)
                param.add_(whole if cut is None else cut(by_name[name], whole))
    return model


def batch(spec: ArchSpec) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(7)
    tokens = torch.randint(spec.vocab, (2, 32), generator=draw)
    labels = torch.randint(spec.vocab, (2, 32), generator=draw)
    mask = (torch.rand(2, 32, generator=draw) < 0.7).double()
    return tokens, torch.arange(32).expand(2, -1), labels, mask


def error_of(spec: ArchSpec, mesh: Mesh, sequence: bool, recompute: str) -> dict[str, float]:
    """Relative error of the loss and of the worst gradient; 0 or 1 for replicated weights whose
    gradients differ between ranks."""
    whole = model_of(spec, "none", None, False)
    part = model_of(spec, recompute, mesh, sequence)
    losses = [model(*batch(spec)).objective for model in (whole, part)]
    for loss in losses:
        loss.backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    by_name = {p.name: p for p in iter_params(spec)}
    total = torch.stack([g.norm() for g in expected.values() if g is not None]).norm()
    worst = unequal = 0.0
    for name, param in part.named_parameters():
        want, grad = expected[name], param.grad
        assert want is not None
        assert grad is not None
        joined = join_from_ranks(spec, mesh, by_name[name], grad)
        # A bias on GPT-2's keys has no effect: its gradient is rounding, compared with the whole.
        worst = max(worst, float((joined - want).norm() / torch.max(want.norm(), 1e-3 * total)))
        if by_name[name].tp_axis is None:
            first = grad.clone()
            dist.broadcast(first, src=0, group=mesh.tp_group)
            unequal = max(unequal, float(not torch.equal(first, grad)))
    difference = float((losses[1] - losses[0]).detach().abs() / losses[0].detach().abs())
    return {"loss": difference, "gradient": worst, "replicas differ": unequal}


# What is left out → module and function that does it. Each must show in the gradients.
BROKEN = {
    "the sum behind attention and MLP": ("sum_over_ranks", False),
    "the sum of gradients into them": ("sum_gradient", False),
    "the sum of norm gradients under sequence parallelism": ("layers.sum_gradient", True),
}


def broken_error(spec: ArchSpec, mesh: Mesh, what: str) -> dict[str, float]:
    """``error_of`` with one piece of communication left out."""
    name, sequence = BROKEN[what]
    module: Any = layers if name.startswith("layers.") else apply
    name = name.removeprefix("layers.")
    kept = getattr(module, name)
    setattr(module, name, lambda x, _group: x)
    try:
        return error_of(spec, mesh, sequence, "none")
    finally:
        setattr(module, name, kept)


def main() -> None:
    dist.init_process_group("gloo")
    tp = dist.get_world_size()
    mesh = build_mesh(ParallelConfig(tp=tp))
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for name, change in VARIANTS.items():
        spec = replace(spec_from_dict(TINY), **change)
        for sequence in (False, True):
            found[f"{name}, sequence {sequence}"] = error_of(spec, mesh, sequence, "none")
    spec = spec_from_dict(TINY)
    for recompute in ("selective", "full"):
        found[f"recompute {recompute}"] = error_of(spec, mesh, True, recompute)
    for what in BROKEN:
        found[f"without {what}"] = broken_error(spec, mesh, what)
    worst = torch.tensor([[e[k] for k in sorted(e)] for e in found.values()])
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    keys = sorted(next(iter(found.values())))
    table = {
        name: dict(zip(keys, row.tolist(), strict=True))
        for name, row in zip(found, worst, strict=True)
    }
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(table))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
