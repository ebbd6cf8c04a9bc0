"""Fields that most Hugging Face decoder configs share, in transformers 4's and 5's spelling.

transformers 4 has ``rope_theta``, ``rope_scaling`` and ``torch_dtype``; transformers 5 has
``rope_parameters`` and ``dtype`` and reads both. A file with only the newer keys makes
transformers 4 fall back, silently, to theta 10000: so both are written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fastllm_planner.arch.spec import ArchError, ArchSpec, RopeSpec, as_table

_ROPE_TYPES_KNOWN = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def require_int(config: Mapping[str, Any], key: str) -> int:
    """A positive integer from an untrusted config; ``ArchError`` names what is wrong."""
    value = config.get(key)
    if value is None:
        raise ArchError(f"config.json has no {key!r}")
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArchError(f"config.json: {key}={value!r} is not a positive integer")
    return value


def _optional_int(config: Mapping[str, Any], key: str, default: int) -> int:
    return default if config.get(key) is None else require_int(config, key)


def read_rope(config: Mapping[str, Any], *, default_theta: float = 10_000.0) -> RopeSpec:
    """Rotary settings from either spelling (``rope_parameters`` wins, as in transformers 5)."""
    params = as_table(config.get("rope_parameters"))
    if params is not None:
        theta = params.get("rope_theta", config.get("rope_theta", default_theta))
        scaling = {k: v for k, v in params.items() if k != "rope_theta"}
    else:
        theta = config.get("rope_theta", default_theta)
        scaling = dict(as_table(config.get("rope_scaling")) or {})
    if "type" in scaling:  # spelling before transformers 4.43
        legacy = scaling.pop("type")
        scaling.setdefault("rope_type", legacy)
    kind = scaling.get("rope_type", "default")
    if kind not in _ROPE_TYPES_KNOWN:
        known = ", ".join(_ROPE_TYPES_KNOWN)
        raise ArchError(f"config.json: rope_type={kind!r} is unknown", hint=f"known: {known}")
    if kind == "default":
        scaling = {}
    if isinstance(theta, bool) or not isinstance(theta, int | float) or theta <= 0:
        raise ArchError(f"config.json: rope_theta={theta!r} is not a positive number")
    return RopeSpec(float(theta), tuple(scaling.items()))


def write_rope(rope: RopeSpec) -> dict[str, Any]:
    """Both spellings of the rotary settings."""
    scaling = rope.scaling_dict
    return {
        "rope_theta": rope.theta,
        "rope_scaling": scaling or None,
        "rope_parameters": {"rope_type": "default", **scaling, "rope_theta": rope.theta},
    }


def first_token_id(config: Mapping[str, Any], key: str) -> int | None:
    """``eos_token_id`` may be a list (Llama 3.1 chat): the first entry is the document end."""
    value = config.get(key)
    if isinstance(value, list):
        value = next(iter(cast("list[Any]", value)), None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def decoder_fields(
    config: Mapping[str, Any], *, norm_eps: float, vocab: int, max_seq_len: int
) -> dict[str, Any]:
    """Keyword arguments of ``ArchSpec`` for a LLaMA-shaped config (keywords: HF defaults)."""
    hidden = require_int(config, "hidden_size")
    heads = require_int(config, "num_attention_heads")
    head_dim = _optional_int(config, "head_dim", max(1, hidden // heads))
    return {
        "layers": require_int(config, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": _optional_int(config, "num_key_value_heads", heads),
        "head_dim": head_dim,
        "ffn_hidden": require_int(config, "intermediate_size"),
        "vocab": _optional_int(config, "vocab_size", vocab),
        "max_seq_len": _optional_int(config, "max_position_embeddings", max_seq_len),
        "norm_eps": float(config.get("rms_norm_eps", norm_eps)),
        "rope": read_rope(config),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "bos_token_id": first_token_id(config, "bos_token_id"),
        "eos_token_id": first_token_id(config, "eos_token_id"),
        "init_std": float(config.get("initializer_range", 0.02)),
    }


def decoder_to_hf(spec: ArchSpec) -> dict[str, Any]:
    """The shared keys back, in both dialects."""
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn_hidden,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": spec.max_seq_len,
        "initializer_range": spec.init_std,
        "rms_norm_eps": spec.norm_eps,
        "tie_word_embeddings": spec.tied_embeddings,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_id,
        "use_cache": True,
        **write_rope(spec.rope),
    }
