"""What every target carries beside the weights: config.json in both dialects, the tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastllm_convert.arrays import Array
from fastllm_convert.checkpoint import Checkpoint, Companions, as_user_error
from fastllm_convert.dtypes import DType
from fastllm_convert.files.json_file import dump, read_object
from fastllm_convert.tokenizers.carry import Carried, carried_files
from fastllm_planner.arch import ArchSpec, from_hf_config, to_hf_config


def target_type(array: Array, dtype: DType | None) -> DType:
    """Casts apply to floating-point tensors only."""
    return dtype if dtype is not None and array.dtype.floating else array.dtype


def companion_files(source: Checkpoint, dtype: DType | None) -> Carried:
    """config.json, generation_config.json and the carried files of any target.

    Formats that have no place for a setting (Meta's, for the context length) lose nothing this way:
    the config travels along and is read back.
    """
    carried = carried_files(source.companions, source.spec)
    files: dict[str, bytes] = {
        "config.json": dump(config_json(source, dtype or source.dtype, carried.token_ids)),
        "generation_config.json": dump(generation_json(source, carried.token_ids)),
        **carried.files,
    }
    return Carried(files, carried.token_ids, carried.notes)


def config_json(source: Checkpoint, dtype: DType, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """A config that transformers 4 and 5 both read right; a source config's other keys are kept."""
    spec = source.spec
    ours = as_user_error("", lambda: to_hf_config(spec, dtype=dtype.torch))
    for key, value in token_ids.items():
        if ours.get(key) is None:
            ours[key] = value
    original = source.companions.hf_config
    if original is None:
        return ours
    # Where both have a key the source's wording stays (a list of eos ids, n_inner: null, ...);
    # ours fills in the other dialect. The stored type is what we write.
    kept = {k: v for k, v in original.items() if not k.startswith("_")}
    merged = {**ours, **kept, "torch_dtype": dtype.torch, "dtype": dtype.torch}
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        if key in ours:
            merged[key] = ours[key]
    for key in ("head_dim", *token_ids):
        if merged.get(key) is None and ours.get(key) is not None:
            merged[key] = ours[key]
    return merged


def generation_json(source: Checkpoint, token_ids: Mapping[str, int]) -> dict[str, Any]:
    """The source's generation config, or the token ids that generation needs."""
    carried = source.companions.generation_config
    if carried is not None:
        return dict(carried)
    spec = source.spec
    ids: dict[str, int | None] = {
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_id,
    }
    for key, value in token_ids.items():
        if ids.get(key) is None:
            ids[key] = value
    known = {k: v for k, v in ids.items() if v is not None}
    return {"_from_model_config": True, **known}


def find_config(folders: Sequence[Path], config: Path | None) -> tuple[ArchSpec, Companions] | None:
    """The model and its companions, from ``--config`` or a config.json in one of ``folders``."""
    roots = list(folders)
    if config is not None:
        file = config / "config.json" if config.is_dir() else config
        roots.insert(0, file.parent)
    else:
        file = next((r / "config.json" for r in roots if (r / "config.json").is_file()), None)
    if file is None:
        return None
    raw = read_object(file)
    spec = as_user_error(str(file), lambda: from_hf_config(raw))
    held = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    tokenizer = next((r for r in roots if any((r / n).is_file() for n in held)), file.parent)
    generation = file.parent / "generation_config.json"
    return spec, Companions(
        folder=tokenizer,
        hf_config=raw,
        generation_config=read_object(generation) if generation.is_file() else None,
    )
