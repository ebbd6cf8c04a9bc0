"""Megatron's tensor names in four dialects, as tables over the tensors of one rank.

``legacy``: Megatron-LM's old GPTModel (``encoder.layers.N.self_attention.query_key_value``).
``core``: megatron-core with its local layers. ``core-te``: with TransformerEngine's, where a norm
belongs to the linear layer after it. ``deepspeed``: Megatron-DeepSpeed's pipeline layers.

All fuse q, k, v (and gate, up) per tensor-parallel rank, so the layouts are those of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from fastllm_convert.arrays import Array, concat
from fastllm_convert.errors import UserError
from fastllm_convert.layouts import Layout, Row, copy, grouped_qkv, stack
from fastllm_planner.arch import ArchSpec, iter_layer_params

DialectName = Literal["legacy", "core", "core-te", "deepspeed"]
QkvLayout = Literal["interleaved", "concat", "version1"]


@dataclass(frozen=True, slots=True)
class Dialect:
    """Names inside a layer, and of what stands before and after the layers."""

    name: DialectName
    layer: str
    input_norm: str
    mlp_norm: str
    qkv: str
    dense: str
    fc1: str
    fc2: str
    embedding: str
    positions: str
    final_norm: str
    head: str


LEGACY = Dialect(
    "legacy", "encoder.layers.{}.", "input_norm", "post_attention_norm",
    "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h", "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight", "encoder.final_norm", "output_layer.weight",
)  # fmt: skip
CORE = Dialect(
    "core", "decoder.layers.{}.", "input_layernorm", "pre_mlp_layernorm",
    "self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2",
    "embedding.word_embeddings.weight", "embedding.position_embeddings.weight",
    "decoder.final_layernorm", "output_layer.weight",
)  # fmt: skip
CORE_TE = Dialect(
    "core-te", "decoder.layers.{}.", "self_attention.linear_qkv.layer_norm",
    "mlp.linear_fc1.layer_norm", "self_attention.linear_qkv", "self_attention.linear_proj",
    "mlp.linear_fc1", "mlp.linear_fc2", "embedding.word_embeddings.weight",
    "embedding.position_embeddings.weight", "decoder.final_layernorm", "output_layer.weight",
)  # fmt: skip
DEEPSPEED = Dialect(
    "deepspeed", "", "input_layernorm", "post_attention_layernorm",
    "self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h",
    "mlp.dense_4h_to_h", "word_embeddings.weight", "position_embeddings.weight", "",
    "lm_head.weight",
)  # fmt: skip
# Megatron-DeepSpeed without pipeline: the legacy nesting, its own names inside.
DEEPSPEED_WHOLE = replace(
    DEEPSPEED, layer="encoder.layers.{}.", embedding=LEGACY.embedding, positions=LEGACY.positions,
    final_norm="encoder.final_layernorm", head=LEGACY.head,
)  # fmt: skip
DIALECTS = {d.name: d for d in (LEGACY, CORE, CORE_TE, DEEPSPEED)}


def check_family(spec: ArchSpec) -> None:
    """What no Megatron dialect of ours expresses is refused."""
    if spec.mla is not None:
        raise UserError("latent attention (DeepSeek) is not written or read in Megatron's formats")


def _third(groups: int, queries: int, head_dim: int) -> Layout:
    """checkpoint_version 1: rows ``[heads, head_dim, 3]`` (no grouped queries then)."""
    rows = groups * queries * head_dim

    def join(parts: Sequence[Array]) -> Array:
        return concat([p.split_axis(0, rows, 1) for p in parts], 1).merge_axes(0)

    def split(whole: Array) -> list[Array]:
        cut = whole.split_axis(0, rows, 3)
        return [cut.slice(1, i, i + 1).merge_axes(0) for i in range(3)]

    return Layout("qkv by row", join, split)


def qkv_layout(spec: ArchSpec, tp: int, kind: QkvLayout) -> Layout:
    """Fused rows of one rank."""
    groups, queries = spec.kv_heads // tp, spec.heads // spec.kv_heads
    if kind == "interleaved":
        return grouped_qkv(groups, queries, spec.head_dim)
    if kind == "version1" and queries == 1:
        return _third(groups, queries, spec.head_dim)
    return stack((spec.q_size // tp, spec.kv_size // tp, spec.kv_size // tp))


def layer_rows(
    spec: ArchSpec,
    layer: int,
    dialect: Dialect,
    *,
    tp: int,
    local: int | None = None,
    qkv: QkvLayout = "interleaved",
    experts: Sequence[int] | None = None,
    expert_tp: int | None = None,
) -> list[Row]:
    """Rows of global ``layer``, named as local layer ``local``. ``experts``: those of this rank,
    split over ``expert_tp`` ranks (as the rest when None)."""
    prefix = dialect.layer.format(layer if local is None else local)
    moe = spec.is_moe_layer(layer)
    rows: list[Row] = []
    seen: set[str] = set()
    for param in iter_layer_params(spec, layer):
        if param.expert is not None and experts is not None and param.expert not in experts:
            continue
        module, _, kind = param.name.rpartition(".")
        block, _, leaf = module.rpartition(".")
        if leaf in ("k_proj", "v_proj") or (leaf == "up_proj" and spec.mlp == "swiglu"):
            continue  # part of the fused tensor
        at = None if param.expert is None else (experts or range(1 << 20)).index(param.expert)
        name = _layer_name(dialect, leaf, kind, at, moe=moe, shared=".shared_experts" in block)
        parts = (param.name,)
        how = copy()
        if leaf == "q_proj":
            parts = tuple(f"{block}.{x}_proj.{kind}" for x in "qkv")
            how = qkv_layout(spec, tp, qkv)
        elif leaf == "gate_proj":
            parts = (param.name, f"{block}.up_proj.{kind}")
            split = tp if param.expert is None or expert_tp is None else expert_tp
            how = stack((param.shape[0] // split,) * 2)
        if name in seen:
            raise ValueError(f"two rows named {name}")
        seen.add(name)
        rows.append(Row(prefix + name, parts, how))
    return rows


def _layer_name(
    dialect: Dialect, leaf: str, kind: str, expert: int | None, *, moe: bool, shared: bool
) -> str:
    joint = "_" if dialect.name == "core-te" else "."
    match leaf:
        case "input_layernorm":
            return f"{dialect.input_norm}{joint}{kind}"
        case "post_attention_layernorm":
            if moe and dialect.name == "core-te":  # no linear layer follows: a norm of its own
                return f"pre_mlp_layernorm.{kind}"
            return f"{dialect.mlp_norm}{joint}{kind}"
        case "q_proj":
            return f"{dialect.qkv}.{kind}"
        case "o_proj":
            return f"{dialect.dense}.{kind}"
        case "q_norm" | "k_norm":
            return f"self_attention.{leaf[0]}_layernorm.{kind}"
        case "router":
            if kind == "correction_bias":
                return "mlp.router.expert_bias"
            module = "deepspeed_moe.gate.wg" if dialect.name == "deepspeed" else "router"
            return f"mlp.{module}.{kind}"
        case "gate_proj" | "up_proj":
            return _mlp_name(dialect, dialect.fc1, kind, expert, shared=shared)
        case "down_proj":
            return _mlp_name(dialect, dialect.fc2, kind, expert, shared=shared)
        case _:
            raise UserError(f"no Megatron name for {leaf!r}")


def _mlp_name(dialect: Dialect, module: str, kind: str, expert: int | None, *, shared: bool) -> str:
    leaf = module.removeprefix("mlp.")
    if shared:
        return f"mlp.shared_experts.{leaf}.{kind}"
    if expert is None:
        return f"{module}.{kind}"
    if dialect.name == "core-te":  # one grouped GEMM: the index comes last
        return f"mlp.experts.{leaf}.{kind}{expert}"
    if dialect.name == "core":
        return f"mlp.experts.local_experts.{expert}.{leaf}.{kind}"
    if dialect.name == "deepspeed":
        return f"mlp.deepspeed_moe.experts.deepspeed_experts.{expert}.{leaf}.{kind}"
    return f"mlp.local_experts.{expert}.{leaf}.{kind}"


def embedding_rows(spec: ArchSpec, dialect: Dialect) -> list[Row]:
    rows = [Row(dialect.embedding, ("model.embed_tokens.weight",), copy())]
    if spec.position == "learned":
        rows.append(Row(dialect.positions, ("model.embed_positions.weight",), copy()))
    return rows


def final_rows(spec: ArchSpec, dialect: Dialect) -> list[Row]:
    """The final norm, and the head when it has weights of its own."""
    kinds = ("weight", "bias") if spec.norm == "layernorm" else ("weight",)
    joint = "." if dialect.final_norm else ""
    rows = [Row(f"{dialect.final_norm}{joint}{k}", (f"model.norm.{k}",), copy()) for k in kinds]
    if not spec.tied_embeddings:
        rows.append(Row(dialect.head, ("lm_head.weight",), copy()))
    return rows


def chunk_rows(
    spec: ArchSpec,
    layers: range,
    dialect: Dialect,
    *,
    tp: int,
    first: bool,
    last: bool,
    qkv: QkvLayout = "interleaved",
    experts: Sequence[int] | None = None,
    expert_tp: int | None = None,
) -> list[Row]:
    """Rows of one pipeline chunk: ``layers`` under local numbers, the embedding in the ``first``
    chunk, norm and head in the ``last``."""
    rows = embedding_rows(spec, dialect) if first else []
    for local, layer in enumerate(layers):
        rows += layer_rows(
            spec, layer, dialect, tp=tp, local=local, qkv=qkv, experts=experts, expert_tp=expert_tp
        )
    return rows + (final_rows(spec, dialect) if last else [])


def expert_ranges(spec: ArchSpec, ep: int) -> list[range | None]:
    """Every expert-parallel rank's experts; None: all. ``UserError`` when they do not divide."""
    if ep == 1:
        return [None]
    if spec.moe is None:
        raise UserError(f"ep={ep}, and the model has no experts", hint="drop --ep")
    count = spec.moe.experts
    if count % ep:
        raise UserError(f"ep={ep} does not divide {count} experts")
    return [range(r * count // ep, (r + 1) * count // ep) for r in range(ep)]


def name_table(
    spec: ArchSpec, dialect: Dialect, *, tp: int = 1, qkv: QkvLayout = "interleaved"
) -> list[Row]:
    """All rows of one tensor-parallel rank without pipeline: what the agreement test reads."""
    check_family(spec)
    rows = embedding_rows(spec, dialect)
    for layer in range(spec.layers):
        for row in layer_rows(spec, layer, dialect, tp=tp, qkv=qkv):
            prefix = f"{layer}." if dialect.name == "deepspeed" else ""
            rows.append(row._replace(name=prefix + row.name))
    return rows + final_rows(spec, dialect)
