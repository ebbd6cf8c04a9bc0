"""Parameter counts, to the unit, against published counts or counts made by other means."""

from __future__ import annotations

import pytest

from fastllm_planner.arch import (
    ArchSpec,
    count_active_params,
    count_params,
    iter_params,
    preset,
    preset_names,
)

# Counts of the published checkpoints (their safetensors metadata, papers' tables, or SC21 for
# GPT-3 with the vocabulary padded to 51200).
COUNTS = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "gpt3-175b": 174_615_846_912,
    "llama-7b": 6_738_415_616,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v3": 671_026_419_200,
}
ACTIVE = {
    "mixtral-8x7b": 12_879_925_248,
    "qwen3-30b-a3b": 3_353_032_704,
    "deepseek-v3": 37_552_297_472,
}


@pytest.mark.parametrize(("name", "count"), COUNTS.items(), ids=COUNTS)
def test_count(name: str, count: int) -> None:
    assert count_params(preset(name)) == count


@pytest.mark.parametrize(("name", "count"), ACTIVE.items(), ids=ACTIVE)
def test_active_count(name: str, count: int) -> None:
    assert count_active_params(preset(name)) == count


def test_mpt_7b_has_gpt_shape() -> None:
    # llm-foundry's table: 6,658,859,008; learned positions, biases, tied head, V=50368.
    flags = dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias", "tied_embeddings"), True)
    sizes = {"layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 32, "head_dim": 128}
    spec = ArchSpec(
        **{"family": "gpt2", "ffn_hidden": 16384, "vocab": 50368, "max_seq_len": 2048},
        **{"mlp": "gelu", "norm": "layernorm", "position": "learned"},
        **sizes,
        **flags,
    )
    assert count_params(spec) == 6_658_859_008


def _closed_form(spec: ArchSpec) -> int:
    """The formulas of the literature, written without looking at tensors (dense, no MLA)."""
    h, q, kv = spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    norm = h if spec.norm == "rmsnorm" else 2 * h
    attention = 2 * h * q + 2 * h * kv
    attention += (q + 2 * kv) * spec.qkv_bias + h * spec.attention_out_bias
    attention += 2 * spec.head_dim * spec.qk_norm
    gated = spec.mlp == "swiglu"
    width = spec.ffn_hidden
    mlp = (3 if gated else 2) * h * width + spec.mlp_bias * (h + (2 if gated else 1) * width)
    total = spec.layers * (attention + mlp + 2 * norm) + norm
    total += spec.vocab * h * (1 if spec.tied_embeddings else 2)
    return total + (spec.max_seq_len * h if spec.position == "learned" else 0)


DENSE = [name for name in preset_names() if preset(name).moe is None and preset(name).mla is None]


@pytest.mark.parametrize("name", DENSE)
def test_tensors_sum_to_the_closed_form(name: str) -> None:
    spec = preset(name)
    assert count_params(spec) == _closed_form(spec)


@pytest.mark.parametrize("name", preset_names())
def test_names_are_unique_and_tied_tensors_exist(name: str) -> None:
    seen: set[str] = set()
    for param in iter_params(preset(name)):
        assert param.name not in seen
        assert param.tied_to is None or param.tied_to in seen
        assert param.tp_axis is None or param.tp_axis < len(param.shape)
        seen.add(param.name)
