"""Hugging Face ``config.json`` ↔ spec: round trips, published spellings, and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm_planner.arch import (
    ArchError,
    ArchSpec,
    RopeSpec,
    count_params,
    from_hf_config,
    preset,
    preset_names,
    read_hf_config,
    spec_from_dict,
    spec_to_dict,
    to_hf_config,
)

GOLDEN = Path(__file__).resolve().parents[3] / "shared" / "golden" / "convert"
FAMILIES = {preset(name).family: name for name in preset_names()}


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_survives_hf_and_json(name: str) -> None:
    spec = preset(name)
    through_file = json.loads(json.dumps(to_hf_config(spec, dtype="bfloat16")))
    assert from_hf_config(through_file) == spec
    assert spec_from_dict(json.loads(json.dumps(spec_to_dict(spec)))) == spec
    assert len({spec, from_hf_config(through_file)}) == 1  # hashable, lists inside rope too


def test_every_family_has_a_preset() -> None:
    families = Path(__file__).resolve().parents[2] / (
        "packages/fastllm-planner/src/fastllm_planner/arch/families"
    )
    files = {p.stem for p in families.glob("*.py")} - {"__init__"}
    assert set(FAMILIES) == files


@pytest.mark.parametrize(("family", "name"), FAMILIES.items(), ids=FAMILIES)
def test_transformers_counts_the_same(family: str, name: str) -> None:
    """transformers builds the model from our config, without memory, and counts its tensors."""
    if family == "baichuan":
        pytest.skip("Baichuan's modeling code is on the hub, not in transformers")
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    spec = preset(name)
    small = {**to_hf_config(spec), "n_layer": 4, "num_hidden_layers": 4}
    if "layer_types" in small:
        small["layer_types"] = small["layer_types"][:4]
    if "max_window_layers" in small:
        small["max_window_layers"] = 4
    config = transformers.AutoConfig.for_model(**small)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    counted = sum(p.numel() for p in model.parameters())
    # The per-expert correction is a buffer there, and a tensor of the model here.
    correction = sum(b.numel() for n, b in model.named_buffers() if "correction_bias" in n)
    assert counted + correction == count_params(from_hf_config(small))


def test_published_spellings() -> None:
    base = to_hf_config(preset("llama-3.1-8b"))
    four = {k: v for k, v in base.items() if k != "rope_parameters"}
    five = {k: v for k, v in base.items() if k not in ("rope_theta", "rope_scaling")}
    assert from_hf_config(four) == from_hf_config(five) == preset("llama-3.1-8b")
    old = {**four, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert from_hf_config(old).rope.scaling_dict == {"rope_type": "linear", "factor": 2.0}
    chat = from_hf_config({**four, "eos_token_id": [128001, 128008]})
    assert chat.eos_token_id == 128001


def test_longrope_lists_stay_lists_in_json() -> None:
    rope = RopeSpec.from_table(10_000.0, {"rope_type": "longrope", "short_factor": [1.0, 1.5]})
    spec = ArchSpec(**{**spec_fields(preset("llama-2-7b")), "rope": rope})
    assert to_hf_config(spec)["rope_scaling"]["short_factor"] == [1.0, 1.5]
    assert from_hf_config(to_hf_config(spec)) == spec


def test_equal_rope_settings_are_equal_specs() -> None:
    pairs = (("rope_type", "linear"), ("factor", 2.0))
    assert RopeSpec(1e4, pairs) == RopeSpec(1e4, tuple(reversed(pairs)))
    spec = ArchSpec(**{**spec_fields(preset("llama-2-7b")), "rope": RopeSpec(1e4, pairs)})
    assert from_hf_config(to_hf_config(spec)) == spec


def test_fields_without_effect_need_no_place_in_the_config() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("mixtral-8x7b", {"ffn_hidden": 96}),
        ("deepseek-v3", {"head_dim": 16, "kv_heads": 2}),
        ("gpt2", {"rope": RopeSpec(5e5)}),
        ("llama-2-7b", {"bos_token_id": None, "init_std": 0.01}),
    ]
    for name, changes in cases:
        spec = ArchSpec(**{**spec_fields(preset(name)), **changes})
        assert count_params(from_hf_config(to_hf_config(spec))) == count_params(spec)


def spec_fields(spec: ArchSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in ArchSpec.__dataclass_fields__}


def test_sliding_windows() -> None:
    mistral = to_hf_config(preset("mistral-7b"))
    assert from_hf_config(mistral).sliding_window == 4096
    assert from_hf_config({**mistral, "sliding_window": None}).sliding_window is None
    qwen = to_hf_config(preset("qwen2-0.5b"))
    del qwen["layer_types"]
    keys = {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 20}
    spec = from_hf_config({**qwen, **keys})
    assert (spec.sliding_window, spec.full_attention_layers) == (512, 20)
    assert from_hf_config(to_hf_config(spec)) == spec
    unused = from_hf_config({**qwen, **keys, "use_sliding_window": False})
    assert unused == preset("qwen2-0.5b")
    mixed = ["sliding_attention", "full_attention"] * 12
    with pytest.raises(ArchError, match="layer_types"):
        from_hf_config({**qwen, **keys, "layer_types": mixed})


def test_gpt2_with_another_width() -> None:
    config = to_hf_config(preset("gpt2"))
    assert from_hf_config({**config, "n_inner": None}) == preset("gpt2")
    wide = from_hf_config({**config, "n_inner": 1000})
    assert wide.ffn_hidden == 1000
    assert from_hf_config(to_hf_config(wide)) == wide


@pytest.mark.parametrize(
    ("name", "changes", "lost"),
    [
        ("llama-2-7b", {"qkv_bias": True}, "attention_out_bias"),
        ("llama-2-7b", {"sliding_window": 64}, "sliding_window"),
        ("llama-2-7b", {"mlp": "gelu"}, "mlp='gelu'"),
        ("gpt2", {"kv_heads": 4}, "kv_heads=4"),
        ("gpt2", {"position": "rope"}, "position"),
        ("baichuan2-7b", {"kv_heads": 8}, "kv_heads=8"),
        ("qwen3-8b", {"qk_norm": False}, "qk_norm=False"),
        ("mistral-7b", {"qkv_bias": True}, "qkv_bias=True"),
    ],
)
def test_a_config_that_would_say_something_else_is_refused(
    name: str, changes: dict[str, Any], lost: str
) -> None:
    spec = ArchSpec(**{**spec_fields(preset(name)), **changes})
    with pytest.raises(ArchError, match="cannot express") as raised:
        to_hf_config(spec)
    assert lost in str(raised.value)


def test_baichuan_variants() -> None:
    seven, thirteen = to_hf_config(preset("baichuan2-7b")), to_hf_config(preset("baichuan2-13b"))
    assert "max_position_embeddings" not in thirteen
    assert from_hf_config(seven).position == "rope"
    assert from_hf_config(thirteen).position == "alibi"
    first = {k: v for k, v in seven.items() if k != "z_loss_weight"}
    assert not from_hf_config({**first, "vocab_size": 64_000}).norm_head


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama-2-7b", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ("llama-2-7b", {"num_attention_heads": None}, "no 'num_attention_heads'"),
        ("llama-2-7b", {"num_attention_heads": 0}, "num_attention_heads=0"),
        ("llama-2-7b", {"num_key_value_heads": 5}, "kv_heads=5 does not divide 32"),
        ("llama-2-7b", {"num_hidden_layers": 10**9}, "beyond any model"),
        ("llama-2-7b", {"vocab_size": 10**60}, "beyond any model"),
        ("llama-2-7b", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("llama-2-7b", {"attention_bias": "false"}, "attention_bias"),
        ("llama-2-7b", {"rope_parameters": {"rope_type": "spiral"}}, "rope_type='spiral'"),
        ("llama-2-7b", {"rope_parameters": {"full_attention": {}, "rope_type": "yarn"}}, "scaling"),
        ("llama-2-7b", {"rope_parameters": None, "rope_scaling": [1]}, "rope_scaling"),
        ("llama-2-7b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama-2-7b", {"model_type": ["llama"]}, "model_type"),
        ("gpt2", {"activation_function": "gelu"}, "activation_function"),
        ("gpt2", {"n_head": 7}, "n_head=7"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "active_experts=9"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [5]}, "mlp_only_layers"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("deepseek-v3", {"kv_lora_rank": "512"}, "kv_lora_rank"),
        ("deepseek-v3", {"topk_method": "greedy"}, "topk_method"),
        ("deepseek-v3", {"n_group": 7}, "groups"),
    ],
)
def test_refused(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArchError) as raised:
        from_hf_config({**to_hf_config(preset(name)), **change})
    assert message in str(raised.value)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["yarn", "linear", "default", 2**70, -1, 0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


@settings(max_examples=400, deadline=None)
@given(family=st.sampled_from(sorted(FAMILIES)), data=st.data())
def test_a_malformed_config_is_an_arch_error(family: str, data: st.DataObject) -> None:
    config = copy.deepcopy(to_hf_config(preset(FAMILIES[family])))
    keys = data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=4))
    for key in keys:
        if data.draw(st.booleans()):
            config.pop(key, None)
        else:
            config[key] = data.draw(JUNK)
    try:
        spec = from_hf_config(config)
    except ArchError:
        return
    assert from_hf_config(to_hf_config(spec)) == spec


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_malformed_arch_table_is_an_arch_error(data: st.DataObject) -> None:
    table = spec_to_dict(preset(data.draw(st.sampled_from(["deepseek-v3", "llama-3.1-8b"]))))
    inner = data.draw(st.sampled_from([key for key in table if isinstance(table[key], dict)]))
    target = data.draw(st.sampled_from([table, table[inner]]))
    target[data.draw(st.sampled_from(sorted(target)) | st.text(max_size=5))] = data.draw(JUNK)
    try:
        spec = spec_from_dict(table)
    except ArchError:
        return
    assert spec_from_dict(spec_to_dict(spec)) == spec


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not JSON"), (b"[]", "not a JSON object"), (b"\xff{}", "not JSON"), (b"", "not JSON")],
)
def test_files_that_are_no_config(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content)
    with pytest.raises(ArchError, match=message):
        read_hf_config(tmp_path)


def test_files_that_exhaust_the_parser(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b"[" * 200_000)
    with pytest.raises(ArchError, match="not JSON"):
        read_hf_config(file)
    file.write_bytes(b" " * (17 << 20) + b"{}")
    with pytest.raises(ArchError, match="larger than"):
        read_hf_config(file)
    with pytest.raises(ArchError, match="cannot read"):
        read_hf_config(tmp_path / "missing.json")


@pytest.mark.shared
@pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared is absent")
def test_golden_configs_parse_and_return() -> None:
    files = sorted(GOLDEN.glob("*/hf/config.json")) + sorted(GOLDEN.glob("*/config.json"))
    assert len(files) >= 14
    for file in files:
        spec = read_hf_config(file)
        assert from_hf_config(to_hf_config(spec)) == spec, file
    assert read_hf_config(GOLDEN / "baichuan2_13b_like/hf").position == "alibi"
    assert read_hf_config(GOLDEN / "baichuan2_13b_like/hf").norm_head
    assert read_hf_config(GOLDEN / "hf_qwen2/hf").qkv_bias
    assert read_hf_config(GOLDEN / "hf_gpt2/hf").ffn_hidden == 256
