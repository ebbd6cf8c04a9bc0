"""From options to a plan: detect the source, read it, lay out the target."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fastllm_convert import __version__
from fastllm_convert.checkpoint import Checkpoint
from fastllm_convert.dtypes import cast_target
from fastllm_convert.engine.plan import Plan
from fastllm_convert.errors import UserError
from fastllm_convert.formats import deepspeed, hf, hf_writer


@dataclass(frozen=True)
class SourceOptions:
    """How to read. ``format`` None: detect."""

    format: str | None = None
    config: Path | None = None
    weights: deepspeed.Weights = "model"


@dataclass(frozen=True)
class TargetOptions:
    """What to write. ``dtype`` None keeps each tensor's type; ``shard_bytes`` for ``hf``."""

    format: str
    dtype: str | None = None
    shard_bytes: int = hf_writer.DEFAULT_SHARD_BYTES


def detect(path: Path) -> str:
    """The format of a folder. Raises ``UserError`` when it is none, or is missing."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    if not path.is_dir():
        raise UserError(f"{path} is a file: name the checkpoint's folder")
    if hf.recognises(path):
        return "hf"
    if deepspeed.recognises(path):
        return "deepspeed"
    raise UserError(
        f"{path} holds no checkpoint of a known format",
        hint="looked for model.safetensors, pytorch_model.bin, latest + mp_rank_*_model_states.pt",
    )


def read_source(path: Path, options: SourceOptions) -> Checkpoint:
    """Headers and pickles only; every name and shape is checked."""
    found = options.format or detect(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist" if not path.exists() else f"{path} is a file")
    if found == "hf":
        return hf.read(path)
    return deepspeed.read(path, weights=options.weights, config=options.config)


def make_plan(source: Checkpoint, options: TargetOptions) -> Plan:
    """What ``options`` write from ``source``."""
    dtype = cast_target(options.dtype) if options.dtype is not None else source.rounded
    return hf_writer.plan(source, dtype=dtype, shard_bytes=options.shard_bytes, version=__version__)
