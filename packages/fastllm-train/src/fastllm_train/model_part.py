"""This rank's part of a model: built on the meta device, cut along every axis, then given memory.

So no rank ever holds more than its part, and ``check`` builds any rank's part of any model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastllm_planner.arch import ArchSpec, ParamSpec, iter_params
from fastllm_train.config import Config
from fastllm_train.context_parallel import cut_context
from fastllm_train.expert_parallel import expert_range, share_out_experts
from fastllm_train.layout import Coordinates, ParallelConfig
from fastllm_train.mesh import Mesh
from fastllm_train.models.attention_core import attention_core
from fastllm_train.models.decoder import Decoder, TrainingModel, assert_parameters
from fastllm_train.models.kernels import kernels_of
from fastllm_train.pipeline.exchange import Exchange
from fastllm_train.pipeline.split import split_layers, stage_of
from fastllm_train.pipeline.stage import PipelineStage, cut_to_stage
from fastllm_train.pipeline.tied import TiedEmbedding
from fastllm_train.tensor_parallel.apply import parallelise


def whole_model(config: Config, spec: ArchSpec) -> TrainingModel:
    """The uncut model on torch's current default device."""
    kernels = kernels_of(config.speed.kernels)
    model = TrainingModel(
        Decoder(
            spec,
            recompute=config.parallel.recompute,
            recompute_elementwise=config.speed.recompute_elementwise,
            kernels=kernels,
            core=attention_core(config.speed),
            documents=config.data.source == "chat",
        )
    )
    model.z_loss = config.optim.z_loss
    assert_parameters(model, spec)
    return model


class _Uninitialised(TorchFunctionMode):
    """While entered, modules leave their parameters as they are. Without memory there is nothing
    to fill; and for random numbers on the meta device torch 2.13 imports its compiler, which takes
    seconds and 0.1 GiB."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def build_part(
    config: Config,
    spec: ArchSpec,
    mesh: Mesh,
    prepare: Callable[[TrainingModel], None] = lambda _: None,
) -> TrainingModel | PipelineStage:
    """The part of rank ``mesh.at``, without memory. ``prepare`` sees it before tensor and context
    parallelism are wired around its modules. Collective."""
    with torch.device("meta"), _Uninitialised():
        model = whole_model(config, spec)
    parallel = config.parallel
    if parallel.pp > 1:
        layers = split_layers(spec, config.batch.seq_len, parallel.pp)[mesh.at.pp]
        cut_to_stage(model, layers, first=mesh.first_stage, last=mesh.last_stage)
    if parallel.ep > 1:
        share_out_experts(model, mesh)
    prepare(model)
    if parallel.tp > 1:
        parallelise(model, spec, mesh, sequence_parallel=parallel.sequence_parallel)
    if parallel.cp > 1:
        cut_context(model.model, mesh)
    if config.speed.compile:
        model.model.compile_layers()
    if parallel.pp == 1:
        return model
    return PipelineStage(model, first=mesh.first_stage, last=mesh.last_stage)


def materialise(
    part: TrainingModel | PipelineStage, device: torch.device, dtype: torch.dtype
) -> torch.Tensor | None:
    """Give ``part`` new parameters with memory, uninitialised.

    Returns the last stage's copy of a tied embedding: no parameter, since the first stage's
    optimizer owns it; it collects a gradient as one does.
    """
    copy: torch.Tensor | None = None
    spec: ArchSpec = part.spec
    if spec.tied_embeddings and isinstance(part, PipelineStage) and hasattr(part, "lm_head"):
        head = part.get_submodule("lm_head")
        shape = head.get_parameter("weight").shape
        del head.weight
        copy = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
        head.weight = copy  # type: ignore[assignment]
    made: dict[int, nn.Parameter] = {}  # tied ones stay one parameter
    for module in part.modules():
        for name, param in module.named_parameters(recurse=False):
            if id(param) not in made:
                empty = torch.empty(param.shape, dtype=dtype, device=device)
                made[id(param)] = nn.Parameter(empty)
            module.register_parameter(name, made[id(param)])
    return copy


def embedding_weight(part: TrainingModel | PipelineStage) -> nn.Parameter | None:
    """None on a stage without the embedding."""
    for name, param in part.named_parameters():
        if name == "model.embed_tokens.weight":
            return param
    return None


def tie_ends(
    part: TrainingModel | PipelineStage, copy: torch.Tensor | None, mesh: Mesh, exchange: Exchange
) -> TiedEmbedding | None:
    """What keeps a tied embedding on two stages one; None where it is not. ``copy``: that of
    ``materialise``."""
    spec: ArchSpec = part.spec
    if not spec.tied_embeddings or mesh.parallel.pp == 1:
        return None
    return TiedEmbedding(mesh, exchange, embedding_weight(part), copy)


def activation_shape(config: Config, spec: ArchSpec) -> tuple[int, ...]:
    """Of what goes from stage to stage: [micro, positions of a rank, H]."""
    parallel = config.parallel
    length = config.batch.seq_len // parallel.cp
    if parallel.sequence_parallel:
        length //= parallel.tp
    return (config.batch.micro, length, spec.hidden)


def holders(
    param: ParamSpec, spec: ArchSpec, parallel: ParallelConfig, split: Sequence[range]
) -> list[int]:
    """The ranks that own a part of ``param`` (a tied head: the embedding's)."""
    stage = stage_of(param, split)
    ep_rank = None
    if param.expert is not None and parallel.ep > 1:
        assert spec.moe is not None
        each = range(parallel.ep)
        ep_rank = next(
            r for r in each if param.expert in expert_range(spec.moe.experts, parallel.ep, r)
        )

    def holds(at: Coordinates) -> bool:
        return at.pp == stage and ep_rank in (None, at.ep)

    return [rank for rank in range(parallel.world_size) if holds(parallel.coordinates(rank))]


def owners(config: Config, spec: ArchSpec) -> dict[str, int]:
    """Which rank writes each parameter into a portable checkpoint: holders in turn."""
    split = split_layers(spec, config.batch.seq_len, config.parallel.pp)
    names: dict[str, int] = {}
    for index, param in enumerate(p for p in iter_params(spec) if p.tied_to is None):
        ranks = holders(param, spec, config.parallel, split)
        names[param.name] = ranks[index % len(ranks)]
    return names
