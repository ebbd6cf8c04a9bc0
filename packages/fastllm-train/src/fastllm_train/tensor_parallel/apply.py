"""Turning a plain model into this rank's part of a tensor-parallel one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastllm_planner.arch import ArchSpec, ParamSpec, iter_params
from fastllm_train.collectives import (
    gather_sequence,
    mean_of_replicated,
    scatter_sequence,
    sum_gradient,
    sum_over_ranks,
)
from fastllm_train.mesh import Mesh
from fastllm_train.models.decoder import Block, TrainingModel
from fastllm_train.models.mlp import Gelu, MixtureOfExperts, SwiGLU
from fastllm_train.models.norm import LayerNorm, RMSNorm
from fastllm_train.tensor_parallel.columns import ColumnParallel
from fastllm_train.tensor_parallel.layers import (
    PartialLinear,
    SharedEmbedding,
    SharedLinear,
    SharedNorm,
    VocabularyEmbedding,
)
from fastllm_train.tensor_parallel.sharding import shard_of, shard_shape


def parallelise(
    model: TrainingModel, spec: ArchSpec, mesh: Mesh, *, sequence_parallel: bool
) -> None:
    """Cut ``model``'s parameters to this rank's part and put the communication around its modules.

    ``model`` may be a pipeline stage's part. Weights are not carried over: initialise or load
    afterwards. Collective (it makes groups).
    """
    _cut_parameters(model, spec, mesh)
    wiring = _Wiring(mesh, sequence_parallel)
    trunk = model.model
    first_row = mesh.tp_rank * (spec.vocab // mesh.tp)
    if hasattr(trunk, "embed_tokens"):
        assert isinstance(trunk.embed_tokens, nn.Embedding)
        trunk.embed_tokens = VocabularyEmbedding(trunk.embed_tokens, first_row)
        trunk.embed_tokens.register_forward_hook(wiring.after)
        if sequence_parallel and spec.position == "learned":
            assert isinstance(trunk.embed_positions, nn.Embedding)
            trunk.embed_positions = SharedEmbedding(trunk.embed_positions, mesh.tp_group)
    copies = mesh.tp // spec.kv_heads if spec.kv_heads < mesh.tp else 1
    sharing = mesh.subgroup(copies) if copies > 1 else None
    for block in trunk.layers.values():
        assert isinstance(block, Block)
        wiring.block(block)
        attention = block.self_attn
        attention.first_head = mesh.tp_rank * (spec.heads // mesh.tp)
        if sharing is not None:
            assert isinstance(attention.k_proj, nn.Linear)
            assert isinstance(attention.v_proj, nn.Linear)
            attention.k_proj = SharedLinear(attention.k_proj, sharing)
            attention.v_proj = SharedLinear(attention.v_proj, sharing)
        if spec.qk_norm:  # every rank sees its own heads
            attention.q_norm = wiring.shared_norm(attention.q_norm)
            attention.k_norm = wiring.shared_norm(attention.k_norm)
    if not hasattr(model, "lm_head"):
        return
    if sequence_parallel:
        trunk.norm = wiring.shared_norm(trunk.norm)
    model.lm_head.register_forward_pre_hook(lambda _m, args: (wiring.enter(args[0]), *args[1:]))
    model.first_row, model.vocabulary_group = first_row, mesh.tp_group


class _Wiring:
    """How activations enter and leave a region whose weights are cut."""

    def __init__(self, mesh: Mesh, sequence_parallel: bool) -> None:
        self._group = mesh.tp_group
        self._sequence_parallel = sequence_parallel

    def enter(self, x: Tensor) -> Tensor:
        """The whole activation on every rank; each rank's gradient is a part of the sum."""
        into: Callable[..., Tensor] = gather_sequence if self._sequence_parallel else sum_gradient
        return into(x, self._group)

    def leave(self, x: Tensor) -> Tensor:
        """Add up the ranks' parts; with sequence parallelism each keeps its positions."""
        out: Callable[..., Tensor] = scatter_sequence if self._sequence_parallel else sum_over_ranks
        return out(x, self._group)

    def after(self, _module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        """``leave`` as a forward hook."""
        return self.leave(out)

    def block(self, block: Block) -> None:
        attention, mlp = block.self_attn, block.mlp
        columns = ColumnParallel(self._group, sequence_parallel=self._sequence_parallel)
        attention.project = columns
        attention.o_proj = self._behind(attention, attention.o_proj)
        if isinstance(mlp, MixtureOfExperts):
            self._experts(mlp)
        else:
            assert isinstance(mlp, SwiGLU | Gelu)
            mlp.project = columns
            mlp.down_proj = self._behind(mlp, mlp.down_proj)
        if self._sequence_parallel:
            block.input_layernorm = self.shared_norm(block.input_layernorm)
            block.post_attention_layernorm = self.shared_norm(block.post_attention_layernorm)

    def _experts(self, layer: MixtureOfExperts) -> None:
        """Experts are cut like any MLP. The router is not: with sequence parallelism it sees the
        rank's own positions, and what it says goes to the experts with the tokens."""
        inner, group = layer.mix, self._group

        def mix(experts: nn.ModuleDict, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
            x, weight = self.enter(x), self.enter(weight)  # each rank has a part of their gradients
            if self._sequence_parallel:
                chosen = gather_sequence(chosen, group)
            return self.leave(inner(experts, x, weight, chosen))

        layer.mix = mix
        if self._sequence_parallel:
            assert isinstance(layer.router, nn.Linear)
            layer.router = SharedLinear(layer.router, group)
            layer.mean_over_ranks = lambda value: mean_of_replicated(value, group)

    def shared_norm(self, norm: nn.Module) -> SharedNorm:
        assert isinstance(norm, RMSNorm | LayerNorm)
        return SharedNorm(norm, self._group)

    def _behind(self, region: nn.Module, last: nn.Module) -> PartialLinear:
        """A hook behind ``region``, which ends in the row-parallel layer ``last``."""
        assert isinstance(last, nn.Linear)
        partial = PartialLinear(last)

        def leave(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
            total = self.leave(out)
            if partial.bias is None:
                return total
            seen_in_part = self._sequence_parallel
            return total + (
                sum_gradient(partial.bias, self._group) if seen_in_part else partial.bias
            )

        region.register_forward_hook(leave)
        return partial


def _cut_parameters(model: TrainingModel, spec: ArchSpec, mesh: Mesh) -> None:
    modules = dict(model.named_modules())
    made: dict[int, nn.Parameter] = {}  # a tied tensor is cut once
    for param in iter_params(spec):
        owner_name, _, leaf = param.name.rpartition(".")
        if owner_name not in modules:  # on another pipeline stage
            continue
        owner = modules[owner_name]
        old: nn.Parameter = getattr(owner, leaf)
        shape = shard_shape(spec, param, mesh.tp, mesh.tp_rank)
        if shape == param.shape:
            continue
        if id(old) not in made:
            made[id(old)] = nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device))
        setattr(owner, leaf, made[id(old)])


def mark_counted(model: nn.Module, spec: ArchSpec, mesh: Mesh) -> None:
    """Tell DeepSpeed which parameters count in the gradient norm on this rank. (Without a mark,
    DeepSpeed counts a parameter on model-parallel rank 0 only.)"""
    by_name = {p.name: p for p in iter_params(spec)}
    for name, param in model.named_parameters():
        if counts_here(spec, by_name[name], mesh):
            param.tensor_model_parallel = True  # type: ignore[attr-defined]
            param.model_parallel = True  # type: ignore[attr-defined]


def counts_here(spec: ArchSpec, param: ParamSpec, mesh: Mesh) -> bool:
    """Whether sums over the ranks of a replica count this rank's tensor: of copies, the first."""
    shard = shard_of(spec, param, mesh.tp, mesh.tp_rank)
    copies = mesh.tp if shard is None else shard.copies
    return mesh.tp_rank % copies == 0


def cut_to_rank(spec: ArchSpec, mesh: Mesh, param: ParamSpec, whole: Tensor) -> Tensor:
    """This rank's part of a whole tensor."""
    shard = shard_of(spec, param, mesh.tp, mesh.tp_rank)
    return whole if shard is None else whole.narrow(shard.axis, shard.start, shard.length)


def join_from_ranks(spec: ArchSpec, mesh: Mesh, param: ParamSpec, part: Tensor) -> Tensor:
    """The whole tensor on every rank, from each rank's part. Collective over the tensor group."""
    shard = shard_of(spec, param, mesh.tp, mesh.tp_rank)
    if shard is None or mesh.tp == 1:
        return part.clone()
    parts = [torch.empty_like(part) for _ in range(mesh.tp)]
    dist.all_gather(parts, part.contiguous(), group=mesh.tp_group)
    return torch.cat(parts[:: shard.copies], dim=shard.axis)


def copies_differ(spec: ArchSpec, mesh: Mesh, param: ParamSpec, part: Tensor) -> bool:
    """Whether this rank's tensor differs, in any bit, from the first of its copies on the
    tensor-parallel ranks. Collective over the tensor group."""
    shard = shard_of(spec, param, mesh.tp, mesh.tp_rank)
    copies = mesh.tp if shard is None else shard.copies
    if copies == 1:
        return False
    parts = [torch.empty_like(part) for _ in range(mesh.tp)]
    dist.all_gather(parts, part.contiguous(), group=mesh.tp_group)
    return not torch.equal(parts[mesh.tp_rank // copies * copies], part)
