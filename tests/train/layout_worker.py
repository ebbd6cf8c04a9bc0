"""One rank of the fp64 tests of layouts: this rank's part, run by the trainer's schedule, against
the whole model in this process. No DeepSpeed.

Usage: layout_worker.py OUT.json; writes the largest relative errors, by layout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from planted import left_out, left_out_once, replaced
from train_layouts import FAMILIES, TINY, PackedSamples, samples_of, tiny_config

from fastllm_planner.arch import ArchSpec, ParamSpec, iter_params
from fastllm_train import context_parallel, gradient_sums
from fastllm_train.config import Config
from fastllm_train.context_parallel import part_of_sequence
from fastllm_train.data import read_step
from fastllm_train.distributed import enter_group, place_from_env
from fastllm_train.gradient_sums import GradientSums
from fastllm_train.mesh import Mesh, build_mesh
from fastllm_train.model_part import (
    activation_shape,
    build_part,
    embedding_weight,
    materialise,
    whole_model,
)
from fastllm_train.models.initialise import initialise
from fastllm_train.pipeline.exchange import Exchange
from fastllm_train.pipeline.run import Runner
from fastllm_train.pipeline.tied import TiedEmbedding
from fastllm_train.tensor_parallel import apply, columns, layers
from fastllm_train.tensor_parallel.apply import copies_differ, cut_to_rank, join_from_ranks

CPU = torch.device("cpu")
AUX_LOSS = {"moe": {**FAMILIES["mixtral"]["moe"], "aux_loss_coef": 0.02}}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "mixtral": {**FAMILIES["mixtral"], **AUX_LOSS},
    "one key head": {"kv_heads": 1},
    "odd depth": {"layers": 5, "kv_heads": 1},
    "biases": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "qwen3": {"family": "qwen3", "qk_norm": True, "tied_embeddings": True},
    "mistral": {"family": "mistral", "sliding_window": 8},
    "chats": {},  # several documents in a sequence
    "chats, window": {"family": "mistral", "sliding_window": 8},
}
SP = {"sequence_parallel": True}
FULL, SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
# By number of processes. Every family in these …
OF_EVERY_FAMILY: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "tp2": {"tp": 2},
        "tp2 sp": {"tp": 2, **SP},
        "tp2 sp, full": {"tp": 2, **SP, **FULL},
        "pp2": {"pp": 2},
        "pp2, selective": {"pp": 2, **SELECTIVE},
        "cp2": {"cp": 2},
        "dp2, full": {"dp": 2, **FULL},
    },
    4: {
        "tp4": {"tp": 4},
        "tp4 sp": {"tp": 4, **SP},
        "pp4": {"pp": 4},
        "tp2 pp2": {"tp": 2, "pp": 2},
        "tp2 pp2 sp, full": {"tp": 2, "pp": 2, **SP, **FULL},
    },
    8: {"tp2 pp2 dp2": {"tp": 2, "pp": 2, "dp": 2}},
}
# … and single ones. "buckets": replicas' gradients are added up as the torch engine does it.
OTHERS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "mixtral: ep2 dp2": {"ep": 2, "dp": 2},
        "mixtral: ep2 dp2, full": {"ep": 2, "dp": 2, **FULL},
        "llama: dp2, buckets": {"dp": 2},
        "gpt2: cp2, buckets, full": {"cp": 2, **FULL},
        "one key head: tp2 sp": {"tp": 2, **SP},
        "biases: tp2": {"tp": 2},
        "biases: tp2 sp": {"tp": 2, **SP},
        "qwen3: tp2 sp": {"tp": 2, **SP},
        "mistral: tp2 sp, selective": {"tp": 2, **SP, **SELECTIVE},
        "chats: tp2 sp": {"tp": 2, **SP},
        "chats: pp2": {"pp": 2},
        "chats: cp2": {"cp": 2},
        "chats, window: cp2, full": {"cp": 2, **FULL},
    },
    4: {
        "odd depth: pp4": {"pp": 4},
        "llama: tp2 dp2 sp, buckets": {"tp": 2, "dp": 2, **SP},
        "gpt2: pp2 dp2, buckets": {"pp": 2, "dp": 2},
        "mixtral: ep2 dp4, buckets": {"ep": 2, "dp": 4},
        "one key head: tp4 sp": {"tp": 4, **SP},
        "biases: tp4 sp": {"tp": 4, **SP},
        "qwen3: tp4 sp": {"tp": 4, **SP},
        "mistral: tp4": {"tp": 4},
        "llama: cp4": {"cp": 4},
        "llama: cp2 tp2 sp": {"cp": 2, "tp": 2, **SP},
        "llama: cp2 pp2, selective": {"cp": 2, "pp": 2, **SELECTIVE},
        "mistral: cp2 dp2": {"cp": 2, "dp": 2},
        "baichuan: cp2 tp2": {"cp": 2, "tp": 2},
        "gpt2: pp2 dp2": {"pp": 2, "dp": 2},
        "qwen3: cp2 pp2": {"cp": 2, "pp": 2},
        "chats: cp2 pp2": {"cp": 2, "pp": 2},
        "chats: cp2 tp2 sp": {"cp": 2, "tp": 2, **SP},
        "mixtral: tp2 dp2": {"tp": 2, "dp": 2},
        "mixtral: ep2 dp4": {"ep": 2, "dp": 4},
        "mixtral: ep2 tp2 sp": {"ep": 2, "dp": 2, "tp": 2, **SP},
        "mixtral: ep2 cp2": {"ep": 2, "dp": 2, "cp": 2},
        "mixtral: ep2 pp2": {"ep": 2, "dp": 2, "pp": 2},
        "mixtral: cp2 tp2 sp": {"cp": 2, "tp": 2, **SP},
    },
    8: {
        "llama: tp2 pp2 dp2 sp": {"tp": 2, "pp": 2, "dp": 2, **SP},
        "gpt2: tp2 pp2 dp2, buckets": {"tp": 2, "pp": 2, "dp": 2},
        "llama: cp2 tp2 pp2": {"cp": 2, "tp": 2, "pp": 2},
        "mixtral: ep2 tp2 pp2": {"ep": 2, "dp": 2, "tp": 2, "pp": 2},
    },
}
LAYOUTS: dict[int, dict[str, dict[str, Any]]] = {
    size: {
        **{
            f"{family}: {name}": layout
            for family in FAMILIES
            for name, layout in OF_EVERY_FAMILY[size].items()
        },
        **OTHERS[size],
    }
    for size in OTHERS
}


def config_of(name: str, layout: dict[str, Any]) -> Config:
    arch = {**TINY, **ARCHITECTURES[name.split(":")[0]]}
    arch["layers"] = max(arch["layers"], layout.get("pp", 1))
    return tiny_config(
        model={"arch": arch},
        parallel=layout,
        batch={"micro": 1, "global": 4},
        data={"source": "chat", "paths": ["unread"]} if name.startswith("chats") else {},
        speed={"kernels": "torch"},
    )


def filled(
    model: torch.nn.Module, spec: ArchSpec, cut: Callable[[ParamSpec, torch.Tensor], torch.Tensor]
) -> None:
    """The same weights in any layout; norms and biases off ones and zeros, so that each matters."""
    initialise(model, spec, 1, cut=cut)
    by_name = {p.name: p for p in iter_params(spec)}
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim == 1:
                whole = torch.linspace(-0.2, 0.3, by_name[name].shape[0], dtype=torch.float64)
                param.add_(cut(by_name[name], whole))


def micro_batches(config: Config, spec: ArchSpec, dp_rank: int) -> list[Any]:
    dp, samples = config.parallel.dp, samples_of(config, spec)
    source = PackedSamples(samples) if config.data.source == "chat" else samples
    return read_step(source, 8, config.batch, dp, dp_rank, spec.vocab)


def arrays_of(batch: Any) -> tuple[Any, ...]:
    return batch.tokens, batch.position_ids, batch.labels, batch.loss_mask


@cache
def whole_gradients(arch: str, spec: ArchSpec) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradients of the whole batch in one process, micro-batch by micro-batch (an
    auxiliary loss depends on what shares one; in every layout one sequence is one)."""
    config = config_of(arch, {})
    model = whole_model(config, spec).double()
    filled(model, spec, lambda _, whole: whole)
    total = weight = 0.0
    for batch in micro_batches(config, spec, 0):
        loss = model(*(torch.from_numpy(a) for a in arrays_of(batch)))
        loss.objective.backward()
        total += float(loss.cross_entropy)
        weight += float(batch.loss_mask.sum())
    grads = {n: p.grad / weight for n, p in model.named_parameters() if p.grad is not None}
    return total / weight, grads


def same_weights(mesh: Mesh, shared_out: bool) -> dist.ProcessGroup:
    """The ranks that hold the same weights and see other tokens."""
    return mesh.expert_data_group if shared_out else mesh.data_group


def part_gradients(
    config: Config, spec: ArchSpec, mesh: Mesh, buckets: bool
) -> tuple[float, dict[str, torch.Tensor], float]:
    """The same from this rank's part: loss on every rank, whole gradients of what it holds; 1.0 if
    the copies of one differ."""
    part = build_part(config, spec, mesh)
    copy = materialise(part, CPU, torch.float64)
    filled(part, spec, partial(cut_to_rank, spec, mesh))
    exchange = Exchange(mesh, activation_shape(config, spec), torch.float64, CPU)
    tied = None
    if spec.tied_embeddings and config.parallel.pp > 1:
        tied = TiedEmbedding(mesh, exchange, embedding_weight(part), copy)
        tied.share_weight()
    batches = micro_batches(config, spec, mesh.at.dp(config.parallel))
    tensors = [
        [torch.from_numpy(part_of_sequence(a, mesh).copy()) for a in arrays_of(batch)]
        for batch in batches
    ]
    counts = mesh.last_stage and mesh.tp_rank == 0
    sums = torch.tensor([float(t[3].sum()) for t in tensors], dtype=torch.float64).sum() * counts
    dist.all_reduce(sums)
    by_name = {p.name: p for p in iter_params(spec)}
    groups = {
        name: same_weights(mesh, by_name[name].expert is not None and config.parallel.ep > 1)
        for name, _ in part.named_parameters()
    }
    held = [(param, groups[name]) for name, param in part.named_parameters()] if buckets else []
    own = GradientSums(held, torch.float64)
    left = len(tensors)

    def backward(objective: torch.Tensor) -> None:
        nonlocal left
        left -= 1
        own.before_backward(last=left == 0)
        objective.backward()

    runner = Runner(mesh, exchange, tied, part, backward, lambda _: None)
    total = runner.run(tensors, 1 / float(sums)) * counts
    exchange.finish()
    own.finish()
    dist.all_reduce(total)
    grads: dict[str, torch.Tensor] = {}
    unequal = 0.0
    for name, param in part.named_parameters():
        grad = own.of(param)
        assert grad is not None, name
        unequal = max(unequal, float(copies_differ(spec, mesh, by_name[name], grad)))
        if not buckets:
            dist.all_reduce(grad, group=groups[name])
        grads[name] = join_from_ranks(spec, mesh, by_name[name], grad)
    return float(total / sums), grads, unequal


def error_of(name: str, layout: dict[str, Any]) -> dict[str, float]:
    """Relative errors of the loss and of the worst gradient that this rank holds; 1 for tensors
    that tensor-parallel ranks hold in copies whose gradients differ."""
    config = config_of(name, layout)
    spec = config.model.resolve()
    loss, want = whole_gradients(name.split(":")[0], spec)
    got_loss, got, unequal = part_gradients(
        config, spec, build_mesh(config.parallel), buckets="buckets" in name
    )
    total = torch.stack([g.norm() for g in want.values()]).norm()
    # A bias on GPT-2's keys has no effect: its gradient is rounding, compared with the whole.
    worst = max(
        float((got[n] - want[n]).norm() / torch.max(want[n].norm(), 1e-3 * total)) for n in got
    )
    return {"loss": abs(got_loss - loss) / loss, "gradient": worst, "copies differ": unequal}


def no_offset(cut: Callable[..., Any], array: Any, mesh: Mesh) -> Any:
    """Every part of a sequence starts at position 0."""
    part = cut(array, mesh)
    is_positions = array.shape[1] > 1 and bool((array == range(array.shape[1])).all())
    return part - part[:, :1] if is_positions else part


def left_out_of(bucket: int) -> Callable[..., Any]:
    """In place of ``GradientSums._reduce``: one bucket stays as it is on each rank."""

    def reduce(kept: Callable[..., Any], sums: Any, whole: Any) -> Any:
        return None if whole is sums._buckets[bucket] else kept(sums, whole)

    return reduce


# What is done wrong → (layout of 4 processes, what to replace, by a function of it and its
# arguments). Each must show.
HERE = sys.modules[__name__]
BROKEN: dict[str, tuple[str, Any, str, Callable[..., Any]]] = {
    "without one sum": ("llama: tp4", apply, "sum_over_ranks", left_out_once()),
    "without the sum behind attention and MLP": ("llama: tp4", apply, "sum_over_ranks", left_out),
    "without the sum of gradients into them": ("llama: tp4", columns, "start_sum", left_out),
    "without the sum of the head's gradient": ("llama: tp4", apply, "sum_gradient", left_out),
    "without the other ranks' gradients of a sequence": (
        "llama: tp4 sp",
        columns,
        "start_scatter",
        lambda _, x, group: x.chunk(group.size(), 1)[group.rank()].movedim(1, 0).contiguous(),
    ),
    "without the sum of norm gradients": ("llama: tp4 sp", layers, "sum_gradient", left_out),
    "with documents that begin elsewhere": (
        "chats: cp2 pp2",
        context_parallel,
        "gather_sequence",
        lambda gather, ids, group: gather(ids, group).roll(1, dims=1),
    ),
    "without the head's gradient": (
        "gpt2: pp2 dp2",
        TiedEmbedding,
        "_add",
        lambda _add, _tied, grad: grad,
    ),
    "without the mean over parts of a sequence": (
        "mixtral: cp2 tp2 sp",
        context_parallel,
        "mean_of_summed",
        left_out,
    ),
    "with positions that start again": ("llama: cp4", HERE, "part_of_sequence", no_offset),
    "with every rank's experts added up": (
        "mixtral: ep2 dp4",
        HERE,
        "same_weights",
        lambda _same, mesh, _shared_out: mesh.data_group,
    ),
    "without the sum of one bucket": (
        "gpt2: pp2 dp2, buckets",
        GradientSums,
        "_reduce",
        left_out_of(1),
    ),
}


def broken_error(what: str) -> dict[str, float]:
    name, owner, attribute, wrong = BROKEN[what]
    with replaced(owner, attribute, wrong):
        return error_of(name, LAYOUTS[4][name])


def main() -> None:
    place = place_from_env(os.environ)
    assert place is not None
    enter_group(place, "gloo")
    torch.set_num_threads(1)
    gradient_sums.BUCKET_BYTES = 64 * 1024  # several in a tiny model
    world_size = dist.get_world_size()
    found = {name: error_of(name, layout) for name, layout in LAYOUTS[world_size].items()}
    if world_size == 4:
        found |= {what: broken_error(what) for what in BROKEN}
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
