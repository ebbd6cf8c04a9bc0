"""Combinations that cannot train, each refused before anything starts, with the reason.

A section checks its own values (its dataclass); here are the rules between sections.
"""

from __future__ import annotations

from fastllm_planner.arch import ArchSpec
from fastllm_train.config import Config
from fastllm_train.errors import UserError
from fastllm_train.models.supported import check_supported


def refuse(config: Config, spec: ArchSpec) -> None:
    """``UserError`` for the first rule that ``config`` breaks."""
    check_supported(spec)
    _sizes(config, spec)
    _parallel(config)
    _tensor_parallel(config, spec)
    _zero(config)


def _sizes(config: Config, spec: ArchSpec) -> None:
    config.batch.accumulation(config.parallel.dp)
    if config.batch.seq_len > spec.max_seq_len:
        raise UserError(
            f"batch.seq_len={config.batch.seq_len} is longer than the model's {spec.max_seq_len} "
            "positions",
            hint=f"use at most {spec.max_seq_len}, or a model with a larger max_seq_len",
        )
    if config.data.source == "indexed" and not config.data.paths:
        raise UserError(
            "data.paths is empty",
            hint='name a dataset prefix (fastllm-data tokenize), or set data.source="synthetic"',
        )
    if config.schedule.min_lr > config.optim.lr:
        raise UserError(
            f"schedule.min_lr={config.schedule.min_lr} is above optim.lr={config.optim.lr}"
        )


def _parallel(config: Config) -> None:
    parallel = config.parallel
    if parallel.virtual_stages > 1:
        raise UserError(
            f"parallel.virtual_stages={parallel.virtual_stages}: DeepSpeed's pipeline has no "
            "interleaved schedule",
            hint="set parallel.virtual_stages=1",
        )
    for name, what in (
        ("pp", "pipeline parallelism"),
        ("cp", "context parallelism"),
        ("ep", "expert parallelism"),
    ):
        size = getattr(parallel, name)
        if size > 1:
            raise UserError(
                f"parallel.{name}={size}: {what} is not available in this version",
                hint=f"set parallel.{name}=1 and raise parallel.dp",
            )


def _tensor_parallel(config: Config, spec: ArchSpec) -> None:
    tp, sequence_parallel = config.parallel.tp, config.parallel.sequence_parallel
    if tp == 1:
        if sequence_parallel:
            raise UserError(
                "parallel.sequence_parallel shards activations over tensor-parallel ranks: "
                "parallel.tp=1 has none",
                hint="set parallel.sequence_parallel=false",
            )
        return
    if spec.moe is not None:
        raise UserError(
            f"parallel.tp={tp}: experts cannot be cut over tensor-parallel ranks in this version",
            hint="set parallel.tp=1",
        )
    for size, what in (
        (spec.heads, "heads"),
        (spec.ffn_hidden, "MLP columns"),
        (spec.vocab, "vocabulary entries"),
        *([(config.batch.seq_len, "tokens of a sequence")] if sequence_parallel else []),
    ):
        if size % tp:
            sizes = ", ".join(str(n) for n in range(1, min(size, 64) + 1) if size % n == 0)
            raise UserError(
                f"parallel.tp={tp} does not divide {size} {what}", hint=f"use one of {sizes}"
            )
    if spec.kv_heads % tp and tp % spec.kv_heads:
        raise UserError(
            f"parallel.tp={tp} and {spec.kv_heads} key/value heads: neither divides the other"
        )


def _zero(config: Config) -> None:
    parallel = config.parallel
    if parallel.offload == "optimizer" and parallel.zero_stage == 0:
        raise UserError(
            "parallel.offload moves ZeRO's optimizer states: zero_stage=0 has none",
            hint="set parallel.zero_stage=1, 2 or 3",
        )
    if parallel.offload == "optimizer+params" and parallel.zero_stage != 3:
        raise UserError(
            f'parallel.offload="optimizer+params" needs zero_stage=3, not {parallel.zero_stage}',
            hint='set parallel.zero_stage=3, or parallel.offload="optimizer"',
        )
