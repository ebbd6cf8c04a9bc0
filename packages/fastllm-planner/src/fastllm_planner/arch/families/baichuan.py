"""Baichuan and Baichuan2 (arXiv:2309.10305), the hub's own ``baichuan`` model type.

The 7B models rotate positions; the 13B models have ALiBi and say so only by having
``model_max_length`` and no ``max_position_embeddings``. Baichuan2 normalises the rows of its head
at run time (NormHead); Baichuan 1, recognised by its 64,000-piece vocabulary, does not.
``W_pack`` is q, k and v stacked: the same parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastllm_planner.arch.hf_fields import decoder_fields, decoder_to_hf, read_int
from fastllm_planner.arch.spec import ArchSpec

FAMILY = "baichuan"
MODEL_TYPES = ("baichuan",)
_BAICHUAN_1_VOCAB = 64_000


def from_hf(config: Mapping[str, Any]) -> ArchSpec:
    """``config.json`` of a ``BaichuanForCausalLM`` → spec."""
    fields = decoder_fields(config, norm_eps=1e-6, vocab=125_696, max_seq_len=4096)
    alibi = config.get("max_position_embeddings") is None
    if alibi:
        fields["max_seq_len"] = read_int(config, "model_max_length", 4096)
    return ArchSpec(
        family=FAMILY,
        **fields,
        position="alibi" if alibi else "rope",
        norm_head=fields["vocab"] != _BAICHUAN_1_VOCAB or "z_loss_weight" in config,
    )


def to_hf(spec: ArchSpec) -> dict[str, Any]:
    """Spec → the keys of a ``BaichuanForCausalLM`` config (its code has no grouped queries)."""
    shared = decoder_to_hf(spec)
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters"):
        del shared[key]
    if spec.position == "alibi":
        del shared["max_position_embeddings"]
    return {
        "architectures": ["BaichuanForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
        "model_type": "baichuan",
        **shared,
        "model_max_length": spec.max_seq_len,
        "gradient_checkpointing": False,
        **({"z_loss_weight": 0} if spec.norm_head else {}),
    }
