"""Hugging Face's tensor names for every family, as a bijection onto ``iter_params``.

Canonical names are LLaMA's, so most families rename little: GPT-2 stores ``[in, out]`` matrices
(Conv1D) and fuses q, k, v; Baichuan stacks q, k, v in ``W_pack``; Mixtral calls its experts'
matrices w1 (gate), w3 (up) and w2 (down).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

from fastllm_convert.checkpoint import canonical_params
from fastllm_convert.errors import UserError
from fastllm_convert.layouts import Row, copy, stack, transposed
from fastllm_planner.arch import ArchSpec, ParamSpec


class UnsupportedFamily(UserError):
    """No table for this family."""


# transformers' modules list attention, then the MLP, then the norms: the order files were written
# in, and therefore which shard a tensor falls into.
_LAYER_ORDER = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")


def _ordered(spec: ArchSpec) -> Iterator[ParamSpec]:
    def key(param: ParamSpec) -> tuple[int, int, int]:
        stage = ("embedding", "layer", "final_norm", "head").index(param.stage)
        if param.layer is None:
            return stage, 0, 0
        module = param.name.split(".")[3]
        return stage, param.layer, _LAYER_ORDER.index(module)

    yield from sorted(canonical_params(spec), key=key)


def _renamed(spec: ArchSpec, rename: Callable[[str], str]) -> list[Row]:
    return [Row(rename(p.name), (p.name,), copy()) for p in _ordered(spec)]


_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _mixtral(name: str) -> str:
    name = name.replace(".mlp.router.", ".block_sparse_moe.gate.")
    return re.sub(
        r"\.mlp\.experts\.(\d+)\.(\w+)\.",
        lambda m: f".block_sparse_moe.experts.{m[1]}.{_MIXTRAL[m[2]]}.",
        name,
    )


def _gated_experts(name: str) -> str:
    name = name.replace("router.correction_bias", "gate.e_score_correction_bias")
    return name.replace(".mlp.router.", ".mlp.gate.")


def _fused_qkv_rows(spec: ArchSpec, fused: str) -> Iterator[Row]:
    """q, k, v weights (and biases) as one tensor ``fused``, the rest by its canonical name."""
    sizes = (spec.q_size, spec.kv_size, spec.kv_size)
    for param in _ordered(spec):
        head, _, kind = param.name.rpartition(".")
        if head.endswith((".k_proj", ".v_proj")):
            continue
        if head.endswith(".q_proj"):
            block = head.removesuffix("q_proj")
            parts = tuple(f"{block}{x}_proj.{kind}" for x in "qkv")
            yield Row(f"{block}{fused}.{kind}", parts, stack(sizes))
        else:
            yield Row(param.name, (param.name,), copy())


def _baichuan(spec: ArchSpec) -> list[Row]:
    return list(_fused_qkv_rows(spec, "W_pack"))


_GPT2 = (
    ("model.embed_tokens.", "transformer.wte."),
    ("model.embed_positions.", "transformer.wpe."),
    ("model.norm.", "transformer.ln_f."),
    ("model.layers.", "transformer.h."),
    (".self_attn.W_pack.", ".attn.c_attn."),
    (".self_attn.o_proj.", ".attn.c_proj."),
    (".mlp.up_proj.", ".mlp.c_fc."),
    (".mlp.down_proj.", ".mlp.c_proj."),
    (".input_layernorm.", ".ln_1."),
    (".post_attention_layernorm.", ".ln_2."),
)
_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")


def _gpt2(spec: ArchSpec) -> list[Row]:
    rows: list[Row] = []
    for name, canonical, how in _fused_qkv_rows(spec, "W_pack"):
        for ours, theirs in _GPT2:
            name = name.replace(ours, theirs)
        rows.append(Row(name, canonical, transposed(how) if name.endswith(_CONV1D) else how))
    return rows


_TABLES: dict[str, Callable[[ArchSpec], list[Row]]] = {
    "llama": lambda spec: _renamed(spec, str),
    "mistral": lambda spec: _renamed(spec, str),
    "qwen2": lambda spec: _renamed(spec, str),
    "qwen3": lambda spec: _renamed(spec, str),
    "qwen3_moe": lambda spec: _renamed(spec, _gated_experts),
    "deepseek_v3": lambda spec: _renamed(spec, _gated_experts),
    "mixtral": lambda spec: _renamed(spec, _mixtral),
    "baichuan": _baichuan,
    "gpt2": _gpt2,
}

# Buffers that older transformers versions saved: derived from the config, not weights.
_DERIVED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|attn\.bias|attn\.masked_bias|alibi_mask|future_mask)$"
)


def name_table(spec: ArchSpec) -> list[Row]:
    """(Hugging Face name, canonical names, how), in transformers' order; a tied head has no row.

    Raises ``UnsupportedFamily``.
    """
    table = _TABLES.get(spec.family)
    if table is None:
        raise UnsupportedFamily(f"no Hugging Face names for the family {spec.family!r}")
    return table(spec)


def head_row(spec: ArchSpec) -> Row:
    """The tied head's row, for files that carry it all the same."""
    return Row("lm_head.weight", ("lm_head.weight",), copy())


def is_derived(name: str) -> bool:
    """True for saved buffers that the config determines."""
    return _DERIVED.search(name) is not None
