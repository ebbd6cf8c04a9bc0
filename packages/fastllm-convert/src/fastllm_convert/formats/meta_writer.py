"""The Meta folder to write: ``params.json`` and one ``consolidated.NN.pth`` per shard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastllm_convert.checkpoint import Checkpoint
from fastllm_convert.dtypes import DType
from fastllm_convert.engine.plan import OutputFile, Plan, literal_file, sources_of
from fastllm_convert.errors import UserError
from fastllm_convert.files.json_file import dump
from fastllm_convert.files.torch_pickle_writer import Tensor
from fastllm_convert.files.torch_writer import torch_file
from fastllm_convert.formats.companions import companion_files, target_type
from fastllm_convert.formats.meta import name_table, shard_axis
from fastllm_convert.layouts import to_format
from fastllm_convert.sharding import check_tp, part
from fastllm_planner.arch import ArchSpec


def plan(source: Checkpoint, *, shards: int, dtype: DType | None) -> Plan:
    """Raises ``UserError`` for a model that Meta's format cannot describe."""
    spec = source.spec
    _require_llama(spec)
    check_tp(spec, shards)
    full = to_format(name_table(spec), source.tensors)
    # LLaMA 3 raised theta and went to a vocabulary-parallel embedding at once.
    embedding_axis = 0 if spec.rope.theta >= 5e5 else 1
    files: list[OutputFile] = []
    for rank in range(shards):
        held = {
            name: Tensor(
                part(array, shard_axis(name, embedding_axis), shards, rank),
                target_type(array, dtype),
            )
            for name, array in full.items()
        }
        files.append(torch_file(f"consolidated.{rank:02d}.pth", held))
    files.append(literal_file("params.json", dump(params_json(spec))))
    carried = companion_files(source, dtype)
    files += [literal_file(name, content) for name, content in sorted(carried.files.items())]
    return Plan(
        files=files,
        sources=sources_of(list(source.tensors.values())),
        checked=source.checked,
        equal=source.equal,
        notes=[*source.notes, *carried.notes],
    )


def _require_llama(spec: ArchSpec) -> None:
    scaling = spec.rope.scaling_dict
    fixed = (1.0, 4.0, 8192)
    keys = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    wrong = {
        "mixture of experts": spec.moe is not None,
        "latent attention": spec.mla is not None,
        f"{spec.mlp} feed-forward": spec.mlp != "swiglu",
        f"{spec.norm}": spec.norm != "rmsnorm",
        f"{spec.position} positions": spec.position != "rope",
        "biases": spec.qkv_bias or spec.attention_out_bias or spec.mlp_bias,
        "norms on q and k": spec.qk_norm,
        "a sliding window": spec.sliding_window is not None,
        "a normalised head": spec.norm_head,
        "heads that do not fill the hidden size": spec.head_dim * spec.heads != spec.hidden,
        f"{scaling.get('rope_type')} rope scaling": bool(scaling)
        and (
            scaling.get("rope_type") != "llama3"
            or tuple(scaling.get(k, v) for k, v in zip(keys, fixed, strict=True)) != fixed
        ),
    }
    for what, present in wrong.items():
        if present:
            raise UserError(f"Meta's format has no {what}, which this {spec.family} model has")


def _feed_forward(dim: int, multiple: int, multiplier: float | None) -> int:
    """Meta's rule: two thirds of 4 * dim, times the multiplier, up to a multiple."""
    size = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        size = int(multiplier * size)
    return multiple * (-(-size // multiple))


def _width_rules(spec: ArchSpec) -> Iterator[tuple[int, float | None]]:
    for multiple in (256, 1024, 4096, 128, 64, 32, 16, 8, 4, 2, 1):
        for multiplier in (None, 1.3, 1.0, 1.2, 1.5):  # the published models'
            yield multiple, multiplier
    base = int(2 * (4 * spec.hidden) / 3)
    yield 1, spec.ffn_hidden / base
    yield 1, (spec.ffn_hidden + 0.5) / base


def params_json(spec: ArchSpec) -> dict[str, Any]:
    """Keys as Meta writes them; the two that give the feed-forward width are searched for."""
    params: dict[str, Any] = {
        "dim": spec.hidden,
        "n_layers": spec.layers,
        "n_heads": spec.heads,
        "vocab_size": spec.vocab,
        "norm_eps": spec.norm_eps,
    }
    if spec.kv_heads != spec.heads:
        params["n_kv_heads"] = spec.kv_heads
    for multiple, multiplier in _width_rules(spec):
        if _feed_forward(spec.hidden, multiple, multiplier) == spec.ffn_hidden:
            params["multiple_of"] = multiple
            if multiplier is not None:
                params["ffn_dim_multiplier"] = multiplier
            break
    else:
        raise UserError(f"no multiple_of and multiplier give a feed-forward of {spec.ffn_hidden}")
    if spec.rope.theta != 10_000.0:
        params["rope_theta"] = spec.rope.theta
    if spec.rope.scaling:
        params["use_scaled_rope"] = True
    return params
