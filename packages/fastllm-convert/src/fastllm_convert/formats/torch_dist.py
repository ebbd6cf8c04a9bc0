"""torch.distributed.checkpoint folders: ``.metadata`` and ``__R_N.distcp``, whoever wrote them.

megatron-core's ``torch_dist`` stacks its layers (``decoder.layers.mlp.linear_fc2.weight`` is
``[L, h, f]``, one chunk per layer and rank) and always uses TransformerEngine's norm names.
fastllm-train's own checkpoint keeps one tensor per canonical name. Chunks say where they lie in the
whole tensor, so the writer's parallel layout does not matter. Every chunk is a complete little
torch zip inside its file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from fastllm_convert.arrays import Array, Box
from fastllm_convert.checkpoint import Checkpoint, check_shapes, members_of
from fastllm_convert.errors import UserError
from fastllm_convert.files import torch_pickle
from fastllm_convert.files.torch_globals import Call
from fastllm_convert.files.torch_zip import TorchFile, read_torch
from fastllm_convert.formats.companions import find_config
from fastllm_convert.formats.deepspeed import to_canonical
from fastllm_convert.formats.megatron import arguments, describe
from fastllm_convert.formats.megatron_names import CORE_TE, check_family, name_table
from fastllm_convert.formats.rank_merge import RankMerge
from fastllm_planner.arch import ArchSpec, iter_params

_METADATA = ".metadata"
_STACKED = "decoder.layers."
_LOCAL_NORM = "mlp.linear_fc1.layer_norm_"


def checkpoint_folder(path: Path) -> Path | None:
    """The folder with ``.metadata``: ``path``, its latest iteration or tag, or ``model`` in it."""
    candidates = [path]
    for pointer, pattern in (("latest_checkpointed_iteration.txt", "iter_{:07d}"), ("latest", "")):
        file = path / pointer
        if file.is_file():
            text = file.read_bytes()[:256].decode("utf-8", "replace").strip()
            name = pattern.format(int(text)) if pattern and text.isdigit() else text
            if name and "/" not in name and name not in (".", ".."):
                candidates.append(path / name)
    for folder in candidates:
        for inner in (folder, folder / "model"):
            if (inner / _METADATA).is_file():
                return inner
    return None


def recognises(path: Path) -> bool:
    return checkpoint_folder(path) is not None


def read(path: Path, *, config: Path | None = None, vocab_size: int | None = None) -> Checkpoint:
    """Metadata, and the header of every chunk."""
    folder = checkpoint_folder(path)
    if folder is None:
        raise UserError(f"{path} is not a torch.distributed checkpoint")
    tensors, files = read_tensors(folder)
    if any(n.startswith(_STACKED) for n in tensors):
        return _megatron(path, folder, tensors, files, config, vocab_size)
    found = find_config([path, folder, folder.parent], config)
    if found is None:
        raise UserError(
            f"{path} has no config.json, and torch.distributed does not say what the model is",
            hint="pass --config path/to/config.json",
        )
    spec, companions = found
    canonical, equal = to_canonical(spec, _model_part(spec, tensors), str(folder))
    return Checkpoint(
        format="torch_dist",
        summary=f"torch.distributed checkpoint, {spec.family}",
        spec=spec,
        tensors=canonical,
        companions=companions,
        checked=members_of(files),
        equal=equal,
    )


def _model_part(spec: ArchSpec, tensors: Mapping[str, Array]) -> dict[str, Array]:
    """Trainers save {"model": ..., "optimizer": ...}: keep the part that holds the parameters."""
    names = [p.name for p in iter_params(spec) if p.tied_to is None]
    for prefix in ("", "model.", "module.", "state.model.", "app.model."):
        if all(prefix + n in tensors for n in names):
            known = {prefix + p.name: p.name for p in iter_params(spec)}
            part = {known[n]: a for n, a in tensors.items() if n in known}
            others = [n for n in tensors if n not in known and not _is_optimizer(n)]
            if others:
                raise UserError(f"tensor {others[0]!r} belongs to no parameter")
            return part
    return dict(tensors)


def _is_optimizer(name: str) -> bool:
    return name.split(".")[0] in ("optimizer", "optim", "scheduler", "rng", "trainer", "state")


def _megatron(
    path: Path,
    folder: Path,
    tensors: Mapping[str, Array],
    files: list[TorchFile],
    config: Path | None,
    vocab_size: int | None,
) -> Checkpoint:
    common = folder / "common.pt"
    args: Mapping[str, Any] = arguments(read_torch(common)) if common.is_file() else {}
    embedding = tensors.get(CORE_TE.embedding)
    if embedding is None or len(embedding.shape) != 2:
        raise UserError(f"{folder} holds no {CORE_TE.embedding}")
    rows = embedding.shape[0]
    if not args and find_config([path, folder, folder.parent], config) is None:
        raise UserError(
            f"{folder} has neither args nor a config.json: the model is unknown",
            hint="pass --config path/to/config.json",
        )
    spec, companions, notes = describe(path, folder, args, rows, config, vocab_size)
    check_family(spec)
    flat = {n: a for name, array in tensors.items() for n, a in _unstack(spec, name, array)}
    merge = RankMerge(spec, 1, rows, str(folder))
    merge.add(name_table(spec, CORE_TE), [flat])
    kept, tied = check_shapes(spec, merge.finish(), str(folder))
    return Checkpoint(
        format="torch_dist",
        summary=f"megatron-core torch_dist, {spec.family}",
        spec=spec,
        tensors=kept,
        companions=companions,
        checked=members_of(files),
        equal=[*merge.equal, *tied],
        notes=notes,
    )


def _unstack(spec: ArchSpec, name: str, array: Array) -> Iterator[tuple[str, Array]]:
    """``decoder.layers.X`` of shape [L, ...] → ``decoder.layers.i.X``, and
    ``mlp.experts.experts.X`` of shape [E, ...] → ``mlp.experts.Xe``."""
    rest = name.removeprefix(_STACKED)
    if rest == name:
        yield name, array
        return
    if single := re.match(r"(\d+)\.", rest):  # layers that are not alike are not stacked
        yield from _layer(spec, int(single[1]), rest[single.end() :], array)
        return
    for layer, one in enumerate(_along_first(array, spec.layers, name, "layers")):
        yield from _layer(spec, layer, rest, one)


def _layer(spec: ArchSpec, layer: int, rest: str, array: Array) -> Iterator[tuple[str, Array]]:
    moe = layer < spec.layers and spec.is_moe_layer(layer)
    if moe and rest.startswith(_LOCAL_NORM):
        # Local layers save this norm as TransformerEngine's of a layer without experts.
        rest = f"pre_mlp_layernorm.{rest.removeprefix(_LOCAL_NORM)}"
    prefix = f"{_STACKED}{layer}."
    inner = rest.removeprefix("mlp.experts.experts.")
    if not moe or spec.moe is None or inner == rest:
        yield prefix + rest, array
        return
    for expert, one in enumerate(_along_first(array, spec.moe.experts, rest, "experts")):
        yield f"{prefix}mlp.experts.{inner}{expert}", one


def _along_first(array: Array, count: int, name: str, what: str) -> Iterator[Array]:
    held = array.shape[0] if array.shape else 0
    if held != count:
        raise UserError(f"{name!r} stacks {held} {what}, the model has {count}")
    for index in range(count):
        yield array.slice(0, index, index + 1).reshape(*array.shape[1:])


def read_tensors(folder: Path) -> tuple[dict[str, Array], list[TorchFile]]:
    """Name → whole tensor, from its chunks; optimizer states and ``_extra_state`` are left out."""
    metadata = _load_metadata(folder / _METADATA)
    places = _places(metadata.get("storage_data"), folder)
    described = metadata.get("state_dict_metadata")
    if not isinstance(described, dict):
        raise UserError(f"{folder / _METADATA} describes no tensors")
    tensors: dict[str, Array] = {}
    files: list[TorchFile] = []
    for name, entry in cast("dict[Any, Any]", described).items():
        if not isinstance(entry, Call) or not entry.name.endswith(".TensorStorageMetadata"):
            continue  # bytes: _extra_state, RNG states, plain numbers
        if str(name).startswith(("optimizer.", "optim.")):
            continue
        array, used = _tensor(str(name), entry.attributes, places, folder)
        tensors[str(name).removeprefix("module.")] = array
        files += used
    if not tensors:
        raise UserError(f"{folder} holds no tensors")
    return tensors, files


def _load_metadata(file: Path) -> dict[str, Any]:
    def no_storage(storage: torch_pickle.Storage) -> Any:
        raise torch_pickle.PickleError(f"storage {storage.key} in a metadata file")

    try:
        if file.stat().st_size > torch_pickle.MAX_PICKLE_BYTES:
            raise UserError(f"{file} is larger than {torch_pickle.MAX_PICKLE_BYTES:,} bytes")
        value: object = torch_pickle.load(file.read_bytes(), no_storage)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None
    except torch_pickle.PickleError as error:
        raise UserError(f"{file}: {error.message}", error.hint) from None
    if not isinstance(value, Call) or not value.name.endswith(".metadata.Metadata"):
        raise UserError(f"{file} is not checkpoint metadata")
    return value.attributes


Place = tuple[Path, int, int]


def _places(storage: Any, folder: Path) -> dict[tuple[str, tuple[int, ...]], Place]:
    """(name, offsets of the chunk) → (file, start, length)."""
    if not isinstance(storage, dict):
        raise UserError(f"{folder / _METADATA} says nothing of where tensors are stored")
    found: dict[tuple[str, tuple[int, ...]], Place] = {}
    for index, info in cast("dict[Any, Any]", storage).items():
        if not isinstance(index, Call) or not isinstance(info, Call):
            raise UserError(f"{folder / _METADATA} is damaged")
        where = info.attributes
        name, start, length = (where.get(k) for k in ("relative_path", "offset", "length"))
        if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise UserError(f"{folder / _METADATA} points outside its folder: {name!r}")
        if type(start) is not int or type(length) is not int or start < 0 or length < 0:
            raise UserError(f"{folder / _METADATA}: bad range in {name}")
        offsets = index.attributes.get("offset")
        found[str(index.attributes.get("fqn")), _sizes(offsets or (), folder)] = (
            folder / name,
            start,
            length,
        )
    return found


def _sizes(value: Any, folder: Path) -> tuple[int, ...]:
    if not isinstance(value, tuple | list):
        raise UserError(f"{folder / _METADATA}: a size is not a tuple")
    items = tuple(cast("tuple[Any, ...]", value))
    if not all(type(v) is int and 0 <= v < 1 << 63 for v in items):
        raise UserError(f"{folder / _METADATA}: bad size {items}")
    return items


def _tensor(
    name: str,
    entry: Mapping[str, Any],
    places: Mapping[tuple[str, tuple[int, ...]], Place],
    folder: Path,
) -> tuple[Array, list[TorchFile]]:
    shape = _sizes(entry.get("size"), folder)
    chunks: list[tuple[tuple[int, ...], Array]] = []
    files: list[TorchFile] = []
    for chunk in cast("list[Any]", entry.get("chunks") or []):
        fields = chunk.attributes if isinstance(chunk, Call) else {}
        offsets, sizes = (_sizes(fields.get(k), folder) for k in ("offsets", "sizes"))
        place = places.get((name, offsets))
        if place is None:
            raise UserError(f"{folder}: the part of {name!r} at {list(offsets)} is stored nowhere")
        file = read_torch(place[0], start=place[1], size=place[2])
        files.append(file)
        array: object = file.value
        if not isinstance(array, Array) or array.shape != sizes:
            raise UserError(f"{place[0]}: the part of {name!r} at {list(offsets)} is not {sizes}")
        chunks.append((offsets, array))
    return _tiled(name, shape, chunks, folder), files


def _tiled(
    name: str, shape: tuple[int, ...], chunks: list[tuple[tuple[int, ...], Array]], folder: Path
) -> Array:
    """One array from parts at their offsets: inside, of one type, disjoint, and covering all."""
    bad = UserError(f"{folder}: the parts of {name!r} do not make up its shape {list(shape)}")
    if not chunks or sum(a.numel for _, a in chunks) != math.prod(shape):
        raise bad
    dtype = chunks[0][1].dtype
    for offsets, array in chunks:
        if len(offsets) != len(shape) or len(array.shape) != len(shape) or array.dtype != dtype:
            raise bad
        if any(o + n > s for o, n, s in zip(offsets, array.shape, shape, strict=True)):
            raise bad
    if _overlap(chunks):
        raise bad

    def boxes() -> Iterator[Box]:
        for offsets, array in chunks:
            for box in array.boxes():
                start = tuple(a + b for a, b in zip(box.start, offsets, strict=True))
                yield box._replace(start=start)

    return Array(shape, dtype, boxes)


def _overlap(chunks: list[tuple[tuple[int, ...], Array]]) -> bool:
    """Sorted by start, a chunk can only meet those that begin before it ends (along axis 0)."""
    ordered = sorted(chunks, key=lambda c: c[0])
    for i, (start, array) in enumerate(ordered):
        if not start:
            return len(ordered) > 1
        for other, second in ordered[i + 1 :]:
            if other[0] >= start[0] + array.shape[0]:
                break
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(start, array.shape, other, second.shape, strict=True)
            ):
                return True
    return False
