"""From options to a plan: detect the source, read it, lay out the target."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastllm_convert import __version__
from fastllm_convert.checkpoint import Checkpoint
from fastllm_convert.dtypes import DType, cast_target
from fastllm_convert.engine.plan import Plan
from fastllm_convert.errors import UserError

if TYPE_CHECKING:
    from fastllm_convert.formats.deepspeed import Weights
    from fastllm_convert.formats.megatron_names import DialectName, QkvLayout

DEFAULT_SHARD_BYTES = 5_000_000_000  # transformers 4's default; 5's is 50 GB


@dataclass(frozen=True)
class SourceOptions:
    """How to read; each reader takes what concerns it. ``format`` None: detect."""

    format: str | None = None
    config: Path | None = None
    weights: Weights = "model"
    qkv: QkvLayout | None = None
    vocab_size: int | None = None
    max_seq_len: int | None = None
    rope_factor: float | None = None
    tokenizer_model: Path | None = None


@dataclass(frozen=True)
class TargetOptions:
    """What to write. ``dtype`` None keeps each tensor's type; ``shard_bytes`` for ``hf``."""

    format: str
    dtype: str | None = None
    shard_bytes: int = DEFAULT_SHARD_BYTES
    tp: int = 1
    pp: int = 1
    vp: int = 1
    ep: int = 1
    vocab_multiple: int = 128
    dialect: DialectName = "core"
    qkv: QkvLayout = "interleaved"


# Format → how its module is called, in the order in which a folder is tried. A module is imported
# when its turn comes: reading all of them costs a small conversion a tenth of its time.
READERS: dict[str, Callable[[Any, Path, SourceOptions], Checkpoint]] = {
    "hf": lambda hf, path, _: hf.read(path),
    "meta": lambda meta, path, o: meta.read(
        path, max_seq_len=o.max_seq_len, rope_factor=o.rope_factor
    ),
    "universal": lambda universal, path, o: universal.read(
        path, config=o.config, vocab_size=o.vocab_size, qkv=o.qkv
    ),
    "torch_dist": lambda torch_dist, path, o: torch_dist.read(
        path, config=o.config, vocab_size=o.vocab_size
    ),
    "megatron-deepspeed": lambda megatron_deepspeed, path, o: megatron_deepspeed.read(
        path, weights=o.weights, config=o.config, vocab_size=o.vocab_size, qkv=o.qkv
    ),
    "deepspeed": lambda deepspeed, path, o: deepspeed.read(
        path, weights=o.weights, config=o.config
    ),
    "megatron": lambda megatron, path, o: megatron.read(
        path, config=o.config, vocab_size=o.vocab_size, qkv=o.qkv
    ),
}


def _module(name: str) -> Any:
    return importlib.import_module(f"fastllm_convert.formats.{name.replace('-', '_')}")


# What stands beside the weights → what the weights are called.
_INCOMPLETE = {
    "latest": "mp_rank_*_model_states.pt in the folder it names",
    "latest_checkpointed_iteration.txt": "mp_rank_*/model_optim_rng.pt in the folder it names",
    "params.json": "consolidated.NN.pth",
    "config.json": "model.safetensors, pytorch_model.bin or an index of either",
}


def detect(path: Path) -> str:
    """The format of a folder. Raises ``UserError`` when it is none, or is missing."""
    for name in READERS:
        if _module(name).recognises(path):
            return name
    for mark, weights in _INCOMPLETE.items():
        if (path / mark).is_file():
            raise UserError(f"{path} has {mark}, but no {weights}", hint="is a file missing?")
    raise UserError(
        f"{path} holds no checkpoint of a known format",
        hint="known: Hugging Face, Meta (params.json), DeepSpeed (latest), Megatron-LM (iter_*)",
    )


def read_source(path: Path, options: SourceOptions) -> Checkpoint:
    """Headers and pickles only; every name and shape is checked."""
    if not path.is_dir():
        raise UserError(
            f"{path} is a file: name the checkpoint's folder"
            if path.exists()
            else f"{path} does not exist"
        )
    name = options.format or detect(path)
    source = READERS[name](_module(name), path, options)
    if options.tokenizer_model is None:
        return source
    companions = replace(source.companions, tokenizer_model=options.tokenizer_model)
    return replace(source, companions=companions)


def make_plan(source: Checkpoint, options: TargetOptions) -> Plan:
    """What ``options`` write from ``source``."""
    dtype = cast_target(options.dtype) if options.dtype is not None else source.rounded
    if options.format == "hf":
        from fastllm_convert.formats import hf_writer

        _refuse_parallel(options)
        return hf_writer.plan(
            source, dtype=dtype, shard_bytes=options.shard_bytes, version=__version__
        )
    if options.format == "meta":
        from fastllm_convert.formats import meta_writer

        if (options.pp, options.vp, options.ep) != (1, 1, 1):
            raise UserError("Meta's format has no pipeline stages", hint="drop --pp, --vp and --ep")
        return meta_writer.plan(source, shards=options.tp, dtype=dtype)
    return _megatron_plan(source, options, dtype)


def _megatron_plan(source: Checkpoint, options: TargetOptions, dtype: DType | None) -> Plan:
    from fastllm_convert.formats import deepspeed_writer, megatron_writer
    from fastllm_convert.formats.megatron_names import DIALECTS

    if options.format == "deepspeed":
        _refuse_parallel(options)
        return deepspeed_writer.plan(source, dtype=dtype)
    parallel = megatron_writer.Parallel(
        options.tp, options.pp, options.vp, options.ep, options.vocab_multiple
    )
    if options.format == "megatron-deepspeed":
        return deepspeed_writer.plan_pipeline(
            source, parallel=parallel, dtype=dtype, qkv=options.qkv
        )
    return megatron_writer.plan(
        source, parallel=parallel, dialect=DIALECTS[options.dialect], dtype=dtype
    )


def _refuse_parallel(options: TargetOptions) -> None:
    if (options.tp, options.pp, options.vp, options.ep) != (1, 1, 1, 1):
        raise UserError(
            f"--to {options.format} has one file for the whole model",
            hint="--tp and --pp belong to megatron, megatron-deepspeed and (tp) meta",
        )
