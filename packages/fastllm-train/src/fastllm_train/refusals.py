"""Combinations that cannot train, each refused before anything starts, with the reason.

A section checks its own values (its dataclass); here are the rules between sections.
"""

from __future__ import annotations

from fastllm_planner.arch import ArchSpec
from fastllm_train.checkpoint import written_format
from fastllm_train.config import Config
from fastllm_train.engine_choice import chosen_engine, only_deepspeed
from fastllm_train.errors import UserError
from fastllm_train.models.supported import check_supported


def refuse(config: Config, spec: ArchSpec) -> None:
    """``UserError`` for the first rule that ``config`` breaks."""
    check_supported(spec)
    _engine(config)
    _sizes(config, spec)
    _pipeline(config, spec)
    _tensor_parallel(config, spec)
    _context(config, spec)
    _experts(config, spec)
    _zero(config)
    _compile(config, spec)
    _checkpoint(config)


def _engine(config: Config) -> None:
    reason = only_deepspeed(config)
    if config.speed.engine == "torch" and reason:
        raise UserError(
            f'speed.engine="torch": {reason} is DeepSpeed\'s',
            hint='set speed.engine="auto", or change the other',
        )
    if config.precision.masters == "split" and chosen_engine(config) == "deepspeed":
        reason = reason or 'speed.engine="deepspeed"'
        raise UserError(
            f'precision.masters="split" is the torch engine\'s; {reason} takes DeepSpeed, which '
            "keeps whole masters",
            hint='set precision.masters="auto", or change the other',
        )


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
    if config.data.source == "chat" and config.eval.every:
        raise UserError(
            "packed chats have no validation split in this version", hint="set eval.every=0"
        )
    if config.schedule.min_lr > config.optim.lr:
        raise UserError(
            f"schedule.min_lr={config.schedule.min_lr} is above optim.lr={config.optim.lr}"
        )


def _pipeline(config: Config, spec: ArchSpec) -> None:
    parallel = config.parallel
    if parallel.virtual_stages > 1:
        raise UserError(
            f"parallel.virtual_stages={parallel.virtual_stages}: there is no interleaved schedule "
            "in this version",
            hint="set parallel.virtual_stages=1",
        )
    if parallel.pp > spec.layers:
        raise UserError(
            f"parallel.pp={parallel.pp} leaves stages without layers: the model has {spec.layers}",
            hint=f"use at most parallel.pp={spec.layers}",
        )
    if parallel.pp > 1 and parallel.zero_stage == 3:
        raise UserError(
            "parallel.zero_stage=3 gathers a layer's weights for every micro-batch, forward and "
            "backward: with parallel.pp > 1 those of several micro-batches are under way at once",
            hint="set parallel.zero_stage=1 or 2; the pipeline cuts the weights already",
        )


def _context(config: Config, spec: ArchSpec) -> None:
    cp, tp = config.parallel.cp, config.parallel.tp
    if cp == 1:
        return
    pieces = cp * tp if config.parallel.sequence_parallel else cp
    if config.batch.seq_len % pieces:
        raise UserError(
            f"a sequence of {config.batch.seq_len} tokens does not divide into {pieces} parts "
            "(parallel.cp, times parallel.tp with sequence_parallel)",
            hint=f"use a batch.seq_len that is a multiple of {pieces}",
        )
    heads, kv_heads = spec.heads // tp, max(1, spec.kv_heads // tp)
    if heads % cp:
        raise UserError(
            f"parallel.cp={cp} does not divide {heads} heads (heads / parallel.tp): attention "
            "exchanges positions for heads",
            hint="use a parallel.cp that divides them",
        )
    if kv_heads % cp and cp % kv_heads:
        raise UserError(
            f"parallel.cp={cp} and {kv_heads} key/value heads per rank: neither divides the other"
        )


def _compile(config: Config, spec: ArchSpec) -> None:
    if not config.speed.compile:
        return
    gathers = config.parallel.zero_stage == 3 and chosen_engine(config) == "deepspeed"
    for forbidden, why in (
        (spec.moe is not None, "how many tokens an expert gets is not known to the compiler"),
        (gathers, "ZeRO-3 gathers weights in the middle of a layer"),
        (
            config.data.source == "chat" and spec.position == "alibi",
            "packed chats under ALiBi are attended to one by one",
        ),
        (config.parallel.cp > 1, "the exchange of context parallelism is not traced"),
    ):
        if forbidden:
            raise UserError(
                f"speed.compile makes one graph of a layer: {why}", hint="set speed.compile=false"
            )


def _checkpoint(config: Config) -> None:
    form = written_format(config)
    if config.checkpoint.background and form != "portable":
        raise UserError(
            "checkpoint.background writes portable checkpoints; DeepSpeed writes its own in turn",
            hint='set checkpoint.format="portable"',
        )


def _experts(config: Config, spec: ArchSpec) -> None:
    ep = config.parallel.ep
    if ep == 1:
        return
    if spec.moe is None:
        raise UserError(f"parallel.ep={ep}: the model has no experts", hint="set parallel.ep=1")
    if spec.moe.experts % ep:
        raise UserError(
            f"parallel.ep={ep} does not divide {spec.moe.experts} experts",
            hint="use a parallel.ep that divides them",
        )
    if config.parallel.zero_stage == 3:
        raise UserError(
            "parallel.zero_stage=3 shards every weight over all replicas, expert parallelism gives "
            "each its own experts",
            hint="set parallel.zero_stage=1 or 2, or parallel.ep=1",
        )
    if config.checkpoint.format == "deepspeed":
        raise UserError(
            "DeepSpeed's checkpoints do not hold experts that are shared out over ranks",
            hint='set checkpoint.format="portable"',
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
    moe = spec.moe
    if moe is not None and spec.mlp_bias:
        raise UserError(
            f"parallel.tp={tp}: experts with biases cannot be cut over tensor-parallel ranks",
            hint="set parallel.tp=1",
        )
    for size, what in (
        (spec.heads, "heads"),
        *([(spec.ffn_hidden, "MLP columns")] if moe is None or moe.first_dense_layers else []),
        *([(moe.ffn_hidden, "columns of an expert")] if moe is not None else []),
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
    parallel, by_deepspeed = config.parallel, chosen_engine(config) == "deepspeed"
    beyond = parallel.offload != "none" or (by_deepspeed and parallel.ep > 1)
    if config.precision.separate_sums and beyond:
        raise UserError(
            'precision.accumulate="fp32" is not for offload, nor for expert parallelism with ZeRO, '
            "in this version",
            hint='set precision.accumulate="model"',
        )
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
    if parallel.nvme_path:
        _nvme(config)


def _nvme(config: Config) -> None:
    parallel = config.parallel
    if parallel.offload == "none":
        raise UserError(
            "parallel.nvme_path is where parallel.offload goes to: there is none",
            hint='set parallel.offload="optimizer" or "optimizer+params"',
        )
    if parallel.zero_stage != 3:
        raise UserError(
            f"parallel.nvme_path needs zero_stage=3, not {parallel.zero_stage}: DeepSpeed keeps "
            "only ZeRO-3's states in files",
            hint="set parallel.zero_stage=3, or leave parallel.nvme_path out",
        )
    if config.precision.dtype == "fp16":
        raise UserError(
            "parallel.nvme_path is not for fp16 in this version",
            hint='set precision.dtype="bf16"',
        )
    if config.checkpoint.format == "deepspeed":
        raise UserError(
            "DeepSpeed's checkpoints do not bring back states that are on NVMe",
            hint='set checkpoint.format="portable"',
        )
