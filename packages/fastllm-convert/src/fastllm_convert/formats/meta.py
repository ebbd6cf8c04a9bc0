"""Meta's LLaMA checkpoints: ``params.json``, ``consolidated.NN.pth``, ``tokenizer.model``.

Names and shapes: github.com/meta-llama/llama-models, models/llama3/model.py. Rows of q and k are in
rotary pairs (2i, 2i+1); Hugging Face rotates (i, i + d/2). Shards are found by counting files,
never by a model's name. The embedding is split by columns in LLaMA 1 and 2, by rows since LLaMA 3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fastllm_convert.arrays import Array
from fastllm_convert.checkpoint import (
    Checkpoint,
    Companions,
    as_user_error,
    check_names,
    check_shapes,
    members_of,
)
from fastllm_convert.errors import UserError
from fastllm_convert.files.json_file import read_object
from fastllm_convert.files.torch_zip import TorchFile, read_torch
from fastllm_convert.layouts import Row, copy, rotary_pairs
from fastllm_convert.sharding import whole
from fastllm_planner.arch import ArchError, ArchSpec, RopeSpec, read_hf_config

_SHARD = re.compile(r"^consolidated\.(\d\d+)\.pth$")
_LAYER = {
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "attention_norm": ("input_layernorm", None),
    "ffn_norm": ("post_attention_layernorm", None),
}
_TOP = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}


def recognises(path: Path) -> bool:
    return (path / "params.json").is_file() and any(
        _SHARD.match(p.name) for p in path.glob("consolidated.*.pth")
    )


def name_table(spec: ArchSpec, tp: int = 1) -> list[Row]:
    """(Meta's name, canonical name, how) for one of ``tp`` shards; a tied head has no row."""
    rows = [Row("tok_embeddings.weight", ("model.embed_tokens.weight",), copy())]
    for layer in range(spec.layers):
        for theirs, (ours, _) in _LAYER.items():
            how = copy()
            if theirs in ("attention.wq", "attention.wk"):
                heads = spec.heads if theirs == "attention.wq" else spec.kv_heads
                how = rotary_pairs(max(1, heads // tp))
            canonical = f"model.layers.{layer}.{ours}.weight"
            rows.append(Row(f"layers.{layer}.{theirs}.weight", (canonical,), how))
    rows.append(Row("norm.weight", ("model.norm.weight",), copy()))
    if not spec.tied_embeddings:
        rows.append(Row("output.weight", ("lm_head.weight",), copy()))
    return rows


def shard_axis(name: str, embedding_axis: int) -> int | None:
    """The axis along which a tensor of Meta's is split over shards."""
    if name == "tok_embeddings.weight":
        return embedding_axis
    if name == "output.weight":
        return 0
    _, _, rest = name.removeprefix("layers.").partition(".")
    found = _LAYER.get(rest.removesuffix(".weight"))
    return found[1] if found else None


def read(
    path: Path, *, max_seq_len: int | None = None, rope_factor: float | None = None
) -> Checkpoint:
    """Headers and params.json. ``max_seq_len`` and ``rope_factor`` are not in params.json."""
    params = _params(path)
    files = _shard_files(path)
    torch_files = [read_torch(f) for f in files]
    shards = [_tensors(f) for f in torch_files]
    first = shards[0]
    for file, shard in zip(files, shards, strict=True):
        check_names(shard, list(first), str(file))
    spec, notes = _spec(path, params, shards, max_seq_len, rope_factor)
    names = [row.name for row in name_table(spec)]
    optional = frozenset({"output.weight"}) if spec.tied_embeddings else frozenset[str]()
    check_names(first, names, str(path), optional=optional)
    axis = _embedding_axis(spec, first, len(shards), path)
    full, equal = _unshard(spec, shards, axis)
    canonical: dict[str, Array] = {}
    for row in name_table(spec):
        try:
            (canonical[row.canonical[0]],) = row.how.split(full[row.name])
        except ValueError as error:
            raise UserError(f"{path}: tensor {row.name!r}: {error}") from None
    if spec.tied_embeddings and "output.weight" in full:
        canonical["lm_head.weight"] = full["output.weight"]
    kept, tied = check_shapes(spec, canonical, str(path))
    return Checkpoint(
        format="meta",
        summary=f"Meta LLaMA, {len(shards)} shard{'s' * (len(shards) > 1)}",
        spec=spec,
        tensors=kept,
        companions=Companions(folder=path, hf_config=_hf_config(path), add_bos=True),
        checked=members_of(torch_files),
        equal=[*equal, *tied],
        notes=notes,
    )


def _hf_config(path: Path) -> dict[str, Any] | None:
    """A config.json carried along by an earlier conversion."""
    file = path / "config.json"
    return read_object(file) if file.is_file() else None


def _params(path: Path) -> dict[str, Any]:
    raw = read_object(path / "params.json")
    inner = raw.get("model")
    return cast("dict[str, Any]", inner) if isinstance(inner, dict) else raw


def _shard_files(path: Path) -> list[Path]:
    found = {int(m[1]): p for p in path.glob("consolidated.*.pth") if (m := _SHARD.match(p.name))}
    absent = [i for i in range(max(found) + 1) if i not in found]
    if absent:
        raise UserError(f"{path}: consolidated.{absent[0]:02d}.pth is missing")
    return [found[i] for i in range(len(found))]


def _tensors(file: TorchFile) -> dict[str, Array]:
    found: dict[str, Array] = {}
    for name, value in file.entries.items():
        if not isinstance(value, Array):
            raise UserError(f"{file.file.path}: {name!r} is not a tensor")
        if name != "rope.freqs":  # LLaMA 1 and 2: derived from the head size
            found[name] = value
    return found


def _int(params: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = params.get(key, default)
    if value is None and default is not None:
        value = default
    if type(value) is not int or value < 1:
        raise UserError(f"params.json: {key}={value!r} is not a positive integer")
    return value


def _number(params: Mapping[str, Any], key: str, default: float) -> float:
    value = params.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise UserError(f"params.json: {key}={value!r} is not a positive number")
    return float(value)


def _rows(shards: Sequence[Mapping[str, Array]], name: str, path: Path) -> tuple[int, ...]:
    array = shards[0].get(name)
    if array is None or len(array.shape) != 2:
        raise UserError(f"{path}: no matrix {name!r}")
    return array.shape


def _spec(
    path: Path,
    params: Mapping[str, Any],
    shards: Sequence[Mapping[str, Array]],
    max_seq_len: int | None,
    rope_factor: float | None,
) -> tuple[ArchSpec, list[str]]:
    """params.json and, for vocabulary and feed-forward width, the tensors themselves."""
    dim, heads = _int(params, "dim"), _int(params, "n_heads")
    if dim % heads:
        raise UserError(f"params.json: n_heads={heads} does not divide dim={dim}")
    rows, columns = _rows(shards, "tok_embeddings.weight", path)
    vocab = rows if columns * len(shards) == dim else rows * len(shards)
    theta = _number(params, "rope_theta", 10_000.0)
    eps = _number(params, "norm_eps", 1e-5)
    scaled = params.get("use_scaled_rope") is True
    small = scaled and (dim, _int(params, "n_layers")) in _LLAMA_3_2
    length, notes = _length(theta, eps, scaled), list[str]()
    carried = as_user_error("", lambda: read_hf_config(path)) if _hf_config(path) else None
    if max_seq_len is not None:
        length = max_seq_len
    elif carried is not None:
        length = carried.max_seq_len
    else:
        notes.append(
            f"max_position_embeddings is not in params.json: {length} by version "
            "(--max-seq-len changes it)"
        )
    scaling: dict[str, Any] = {}
    if scaled:
        factor = rope_factor or (32.0 if small else 8.0)
        if carried is not None and rope_factor is None:
            factor = float(carried.rope.scaling_dict.get("factor", factor))
        scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3_SCALING}
    try:
        spec = ArchSpec(
            family="llama",
            layers=_int(params, "n_layers"),
            hidden=dim,
            heads=heads,
            kv_heads=_int(params, "n_kv_heads", heads),
            head_dim=dim // heads,
            ffn_hidden=_rows(shards, "layers.0.feed_forward.w1.weight", path)[0] * len(shards),
            vocab=vocab,
            max_seq_len=length,
            norm_eps=eps,
            rope=RopeSpec(theta, tuple(scaling.items())),
            tied_embeddings="output.weight" not in shards[0] or small,
            bos_token_id=carried.bos_token_id if carried else _special(vocab, theta)[0],
            eos_token_id=carried.eos_token_id if carried else _special(vocab, theta)[1],
        )
    except ArchError as error:
        raise UserError(f"{path / 'params.json'}: {error}", error.hint) from None
    return spec, notes


# Meta's constants for use_scaled_rope (models/llama3/model.py, apply_scaling). Only the factor ever
# differed: 8 in Meta's code and LLaMA 3.1, 32 in the small LLaMA 3.2 models (whose heads are tied).
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA_3_2 = ((2048, 16), (3072, 28))


def _special(vocab: int, theta: float) -> tuple[int | None, int | None]:
    """(bos, eos): SentencePiece's 1 and 2; 128000 and 128001 in LLaMA 3's 128,256 entries.

    Other LLaMA-3-like models: from the tokenizer file, later.
    """
    if vocab == 128_256:
        return 128_000, 128_001
    return (1, 2) if vocab > 2 and theta < 5e5 else (None, None)


def _length(theta: float, eps: float, scaled: bool) -> int:
    """Context length by version, from what tells the versions apart."""
    if scaled:
        return 131_072  # 3.1, 3.2
    if theta >= 5e5:
        return 16_384 if theta >= 1e6 else 8192  # Code Llama; 3
    return 2048 if eps < 5e-6 else 4096  # 1 has eps 1e-6, 2 has 1e-5


def _embedding_axis(spec: ArchSpec, shard: Mapping[str, Array], count: int, path: Path) -> int:
    shape = shard["tok_embeddings.weight"].shape
    if shape == (spec.vocab, spec.hidden // count):
        return 1
    if shape == (spec.vocab // count, spec.hidden):
        return 0
    raise UserError(f"{path}: tok_embeddings.weight has shape {list(shape)} in {count} shards")


def _unshard(
    spec: ArchSpec, shards: Sequence[Mapping[str, Array]], embedding_axis: int
) -> tuple[dict[str, Array], list[tuple[str, Array, Array]]]:
    """Whole tensors, and copies that must agree (norms; key/value heads that shards repeat)."""
    full: dict[str, Array] = {}
    equal: list[tuple[str, Array, Array]] = []
    for name in shards[0]:
        parts = [s[name] for s in shards]
        axis = shard_axis(name, embedding_axis)
        if axis is None:
            equal += [
                (f"{name} of shards 0 and {i}", parts[0], p) for i, p in enumerate(parts) if i
            ]
        elif name.endswith((".wk.weight", ".wv.weight")) and spec.kv_heads < len(parts):
            step = len(parts) // spec.kv_heads
            equal += [
                (f"{name} of shards {i - i % step} and {i}", parts[i - i % step], p)
                for i, p in enumerate(parts)
                if i % step
            ]
            parts = parts[::step]
        try:
            full[name] = whole(parts, axis)
        except ValueError as error:
            raise UserError(f"tensor {name!r}: {error}") from None
    return full, equal
