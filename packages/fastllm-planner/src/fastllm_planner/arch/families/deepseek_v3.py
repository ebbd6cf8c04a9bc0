"""DeepSeek-V3 (arXiv:2412.19437), Hugging Face ``deepseek_v3``: latent attention and fine experts.

The multi-token prediction layer (``num_nextn_predict_layers``) is a training aid beside the model
and is not part of the spec: parameter counts are those of the main model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastllm_planner.arch.hf_fields import (
    decoder_fields,
    decoder_to_hf,
    expect,
    read_flag,
    read_int,
    read_number,
    require_int,
)
from fastllm_planner.arch.spec import ArchError, ArchSpec, MlaSpec, MoeSpec

FAMILY = "deepseek_v3"
MODEL_TYPES = ("deepseek_v3",)


def from_hf(config: Mapping[str, Any]) -> ArchSpec:
    """``config.json`` of a ``DeepseekV3ForCausalLM`` → spec; ``head_dim`` is a query head's."""
    expect(config, "attention_bias", False)
    expect(config, "moe_layer_freq", 1)
    expect(config, "scoring_func", "sigmoid")
    expect(config, "topk_method", "noaux_tc")
    mla = MlaSpec(
        q_lora_rank=read_int(config, "q_lora_rank", 0, least=0),
        kv_lora_rank=require_int(config, "kv_lora_rank"),
        qk_nope_head_dim=require_int(config, "qk_nope_head_dim"),
        qk_rope_head_dim=require_int(config, "qk_rope_head_dim"),
        v_head_dim=require_int(config, "v_head_dim"),
    )
    fields = decoder_fields(config, norm_eps=1e-6, vocab=129_280, max_seq_len=4096)
    fields["head_dim"] = mla.qk_nope_head_dim + mla.qk_rope_head_dim
    fields["kv_heads"] = fields["heads"]  # the latent is expanded to every head
    return ArchSpec(family=FAMILY, **fields, mla=mla, moe=_read_moe(config))


def _read_moe(config: Mapping[str, Any]) -> MoeSpec:
    width = require_int(config, "moe_intermediate_size")
    return MoeSpec(
        experts=require_int(config, "n_routed_experts"),
        active_experts=require_int(config, "num_experts_per_tok"),
        ffn_hidden=width,
        shared_ffn_hidden=width * read_int(config, "n_shared_experts", 0, least=0),
        first_dense_layers=read_int(config, "first_k_dense_replace", 0, least=0),
        router_bias=True,
        norm_topk=read_flag(config, "norm_topk_prob", True),
        aux_loss_coef=read_number(config, "aux_loss_alpha", 0.0),
        scoring="sigmoid",
        groups=read_int(config, "n_group", 1),
        active_groups=read_int(config, "topk_group", 1),
        routed_scaling=read_number(config, "routed_scaling_factor", 1.0),
    )


def to_hf(spec: ArchSpec) -> dict[str, Any]:
    """Spec → the keys of a ``DeepseekV3ForCausalLM`` config."""
    moe, mla = spec.moe, spec.mla
    if moe is None or mla is None:
        raise ArchError("family 'deepseek_v3' needs experts and latent attention")
    shared, rest = divmod(moe.shared_ffn_hidden, moe.ffn_hidden)
    if rest:
        raise ArchError("shared experts must be a multiple of one expert's width")
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        **decoder_to_hf(spec),
        "head_dim": mla.qk_rope_head_dim,  # what transformers calls head_dim here
        "attention_bias": False,
        "q_lora_rank": mla.q_lora_rank or None,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "n_routed_experts": moe.experts,
        "n_shared_experts": shared,
        "num_experts_per_tok": moe.active_experts,
        "moe_intermediate_size": moe.ffn_hidden,
        "first_k_dense_replace": moe.first_dense_layers,
        "moe_layer_freq": 1,
        "norm_topk_prob": moe.norm_topk,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "aux_loss_alpha": moe.aux_loss_coef,
        "n_group": moe.groups,
        "topk_group": moe.active_groups,
        "routed_scaling_factor": moe.routed_scaling,
        "num_nextn_predict_layers": 0,
    }
