"""The Hugging Face folder to write: shards, index, configs, tokenizer, card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastllm_convert.arrays import Array
from fastllm_convert.checkpoint import Checkpoint
from fastllm_convert.dtypes import DType
from fastllm_convert.engine.plan import OutputFile, Piece, Plan, literal_file, sources_of
from fastllm_convert.errors import UserError
from fastllm_convert.files.json_file import dump
from fastllm_convert.files.safetensors_file import build_header, write_order
from fastllm_convert.formats.companions import companion_files, target_type
from fastllm_convert.formats.hf_names import name_table
from fastllm_convert.formats.model_card import model_card
from fastllm_convert.layouts import to_format


def plan(source: Checkpoint, *, dtype: DType | None, shard_bytes: int, version: str) -> Plan:
    """Everything that ``--to hf`` writes. ``dtype`` None keeps each tensor's own."""
    spec = source.spec
    tensors = to_format(name_table(spec), source.tensors)
    types = {n: target_type(a, dtype) for n, a in tensors.items()}
    shards = split_shards(tensors, types, shard_bytes)
    files = [_shard(i, len(shards), names, tensors, types) for i, names in enumerate(shards)]
    if len(shards) > 1:
        files.append(_index(shards, tensors, types))
    main_type = dtype or source.dtype
    carried = companion_files(source, dtype)
    texts = dict(carried.files)
    texts.setdefault("README.md", model_card(source, main_type, version))
    files += [literal_file(name, content) for name, content in sorted(texts.items())]
    return Plan(
        files=files,
        sources=sources_of(list(source.tensors.values())),
        checked=source.checked,
        equal=source.equal,
        notes=[*source.notes, *carried.notes],
    )


def split_shards(
    tensors: Mapping[str, Array], types: Mapping[str, DType], limit: int
) -> list[list[str]]:
    """Tensors in order, a new shard whenever the next would pass ``limit`` bytes."""
    if limit < 1:
        raise UserError(f"--shard-size {limit} is not a positive number of bytes")
    shards: list[list[str]] = [[]]
    filled = 0
    for name, array in tensors.items():
        size = array.numel * types[name].itemsize
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def shard_name(index: int, count: int) -> str:
    return (
        "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
    )


def _shard(
    index: int,
    count: int,
    names: Sequence[str],
    tensors: Mapping[str, Array],
    types: Mapping[str, DType],
) -> OutputFile:
    order = write_order({name: types[name] for name in names})
    header = build_header([(n, types[n], tensors[n].shape) for n in order])
    pieces: list[Piece] = []
    at = len(header)
    for name in order:
        pieces.append(Piece(name, at, tensors[name], types[name]))
        at += pieces[-1].nbytes
    return OutputFile(shard_name(index, count), at, tuple(pieces), ((0, header),))


def _index(
    shards: Sequence[Sequence[str]], tensors: Mapping[str, Array], types: Mapping[str, DType]
) -> OutputFile:
    weight_map = {
        name: shard_name(i, len(shards)) for i, names in enumerate(shards) for name in names
    }
    total = sum(a.numel * types[n].itemsize for n, a in tensors.items())
    count = sum(a.numel for a in tensors.values())
    metadata = {"total_parameters": count, "total_size": total}
    content = dump({"metadata": metadata, "weight_map": weight_map})
    return literal_file("model.safetensors.index.json", content)
