"""GPT-2 (Radford et al. 2019) and GPT-3's sizes (arXiv:2005.14165), Hugging Face ``gpt2``.

GPT-3's alternating sparse attention has the same parameters; it is counted as full attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastllm_planner.arch.hf_fields import (
    expect,
    first_token_id,
    read_flag,
    read_int,
    read_number,
    require_int,
)
from fastllm_planner.arch.spec import ArchError, ArchSpec

FAMILY = "gpt2"
MODEL_TYPES = ("gpt2",)


def from_hf(config: Mapping[str, Any]) -> ArchSpec:
    """``config.json`` of a ``GPT2LMHeadModel`` → spec. Raises for its attention variants."""
    expect(config, "activation_function", "gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    expect(config, "scale_attn_weights", True)
    expect(config, "scale_attn_by_inverse_layer_idx", False)
    expect(config, "add_cross_attention", False)
    hidden, heads = require_int(config, "n_embd"), require_int(config, "n_head")
    if hidden % heads:
        raise ArchError(f"config.json: n_head={heads} does not divide n_embd={hidden}")
    return ArchSpec(
        family=FAMILY,
        layers=require_int(config, "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        ffn_hidden=read_int(config, "n_inner", 4 * hidden),
        vocab=read_int(config, "vocab_size", 50_257),
        max_seq_len=read_int(config, "n_positions", 1024),
        mlp="gelu",
        norm="layernorm",
        norm_eps=read_number(config, "layer_norm_epsilon", 1e-5),
        position="learned",
        qkv_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        tied_embeddings=read_flag(config, "tie_word_embeddings", True),
        bos_token_id=first_token_id(config, "bos_token_id"),
        eos_token_id=first_token_id(config, "eos_token_id"),
        init_std=read_number(config, "initializer_range", 0.02),
    )


def to_hf(spec: ArchSpec) -> dict[str, Any]:
    """Spec → the keys of a ``GPT2LMHeadModel`` config."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": spec.vocab,
        "n_positions": spec.max_seq_len,
        "n_embd": spec.hidden,
        "n_layer": spec.layers,
        "n_head": spec.heads,
        "n_inner": spec.ffn_hidden,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": spec.norm_eps,
        "initializer_range": spec.init_std,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": spec.tied_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_id,
        "use_cache": True,
    }
