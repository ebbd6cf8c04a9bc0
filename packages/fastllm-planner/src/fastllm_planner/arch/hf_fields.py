"""Fields that most Hugging Face decoder configs share, in transformers 4's and 5's spelling.

transformers 4 has ``rope_theta``, ``rope_scaling`` and ``torch_dtype``; transformers 5 has
``rope_parameters`` and ``dtype`` and reads both. A file with only the newer keys makes
transformers 4 fall back, silently, to theta 10000: so both are written.

A config is untrusted: every reader here raises ``ArchError`` for a value of the wrong kind, and
for one that the spec cannot express (another activation, a partial rotary embedding).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fastllm_planner.arch.spec import (
    ArchError,
    ArchSpec,
    RopeSpec,
    as_table,
    check_size,
    is_number,
)

_ROPE_TYPES_KNOWN = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def require_int(config: Mapping[str, Any], key: str) -> int:
    """A positive integer from an untrusted config; ``ArchError`` names what is wrong."""
    value = config.get(key)
    if value is None:
        raise ArchError(f"config.json has no {key!r}")
    check_size(f"config.json: {key}", value)
    return value


def read_int(config: Mapping[str, Any], key: str, default: int, *, least: int = 1) -> int:
    """An integer, or ``default`` where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    check_size(f"config.json: {key}", value, least=least)
    return value


def read_number(config: Mapping[str, Any], key: str, default: float) -> float:
    """A finite number, or ``default`` where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if not is_number(value):
        raise ArchError(f"config.json: {key}={value!r} is not a number")
    return float(value)


def read_flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """A boolean, or ``default`` where the key is absent or null."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise ArchError(f"config.json: {key}={value!r} is neither true nor false")
    return value


def expect(config: Mapping[str, Any], key: str, *allowed: object) -> None:
    """Refuse a value of ``key`` that the spec has no field for; absent or null is the default."""
    value = config.get(key)
    if value is not None and value not in allowed:
        wanted = " or ".join(repr(item) for item in allowed)
        raise ArchError(
            f"config.json: {key}={value!r} is not supported", hint=f"supported: {wanted}"
        )


def read_rope(config: Mapping[str, Any], *, default_theta: float = 10_000.0) -> RopeSpec:
    """Rotary settings from either spelling (``rope_parameters`` wins, as in transformers 5)."""
    expect(config, "partial_rotary_factor", 1, 1.0)
    params = as_table(config.get("rope_parameters"))
    if params is not None:
        theta = params.get("rope_theta", config.get("rope_theta", default_theta))
        scaling = {k: v for k, v in params.items() if k != "rope_theta"}
    else:
        theta = config.get("rope_theta", default_theta)
        table = config.get("rope_scaling")
        if table is not None and as_table(table) is None:
            raise ArchError(f"config.json: rope_scaling={table!r} is not a table")
        scaling = dict(as_table(table) or {})
    expect(scaling, "partial_rotary_factor", 1, 1.0)
    scaling.pop("partial_rotary_factor", None)
    if "type" in scaling:  # spelling before transformers 4.43
        legacy = scaling.pop("type")
        scaling.setdefault("rope_type", legacy)
    kind = scaling.get("rope_type", "default")
    if kind not in _ROPE_TYPES_KNOWN:
        known = ", ".join(_ROPE_TYPES_KNOWN)
        raise ArchError(f"config.json: rope_type={kind!r} is unknown", hint=f"known: {known}")
    if kind == "default":
        scaling = {}
    return RopeSpec.from_table(default_theta if theta is None else theta, scaling)


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
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if value >= 0 else None  # -1 stands for "none" in some files


def read_window(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Qwen's ``use_sliding_window``: layers before ``max_window_layers`` attend to everything."""
    if not read_flag(config, "use_sliding_window", False) or config.get("sliding_window") is None:
        return {}
    window = require_int(config, "sliding_window")
    full = min(read_int(config, "max_window_layers", 28, least=0), layers)
    types = config.get("layer_types")
    if isinstance(types, list):
        kinds = cast("list[object]", types)
        full = next((i for i, kind in enumerate(kinds) if kind == "sliding_attention"), layers)
        expected = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
        if kinds != expected:
            raise ArchError(
                "config.json: layer_types is not full attention followed by sliding windows"
            )
    return {} if full == layers else {"sliding_window": window, "full_attention_layers": full}


def write_window(spec: ArchSpec) -> dict[str, Any]:
    """Inverse of ``read_window``."""
    if spec.sliding_window is None:
        full = spec.layers
    else:
        full = min(spec.full_attention_layers, spec.layers)
    return {
        "use_sliding_window": spec.sliding_window is not None,
        "sliding_window": spec.sliding_window,
        "max_window_layers": full,
        "layer_types": ["full_attention"] * full + ["sliding_attention"] * (spec.layers - full),
    }


def decoder_fields(
    config: Mapping[str, Any],
    *,
    norm_eps: float,
    vocab: int,
    max_seq_len: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    theta: float = 10_000.0,
) -> dict[str, Any]:
    """Keyword arguments of ``ArchSpec`` for a LLaMA-shaped config (keywords: HF defaults)."""
    expect(config, "hidden_act", "silu", "swish")
    hidden = require_int(config, "hidden_size")
    heads = require_int(config, "num_attention_heads")
    # Mistral's own default (8) cannot be meant where it does not divide the heads.
    default_kv = kv_heads if kv_heads and heads % kv_heads == 0 else heads
    return {
        "layers": require_int(config, "num_hidden_layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": read_int(config, "num_key_value_heads", default_kv),
        "head_dim": read_int(config, "head_dim", head_dim or max(1, hidden // heads)),
        "ffn_hidden": require_int(config, "intermediate_size"),
        "vocab": read_int(config, "vocab_size", vocab),
        "max_seq_len": read_int(config, "max_position_embeddings", max_seq_len),
        "norm_eps": read_number(config, "rms_norm_eps", norm_eps),
        "rope": read_rope(config, default_theta=theta),
        "tied_embeddings": read_flag(config, "tie_word_embeddings", False),
        "bos_token_id": first_token_id(config, "bos_token_id"),
        "eos_token_id": first_token_id(config, "eos_token_id"),
        "init_std": read_number(config, "initializer_range", 0.02),
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
