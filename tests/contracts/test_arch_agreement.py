"""Planner, trainer, converter and transformers agree on what a model is, tensor by tensor."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import transformers

from fastllm_convert.formats import hf as hf_format
from fastllm_planner.arch import (
    ArchSpec,
    count_params,
    iter_params,
    preset,
    preset_names,
    spec_from_dict,
    spec_to_dict,
    to_hf_config,
)
from fastllm_train.models.decoder import Decoder
from fastllm_train.models.supported import FAMILIES

SHRUNK = {"layers": 2, "hidden": 64, "vocab": 128, "max_seq_len": 64, "ffn_hidden": 96}
# transformers has no Baichuan: its published code is not ours to ship.
NOT_IN_TRANSFORMERS = {"baichuan"}


def tiny(spec: ArchSpec) -> ArchSpec:
    """The same architecture, small: every choice that is not a size stays."""
    raw = {**spec_to_dict(spec), **SHRUNK}
    heads = 8 if spec.heads % 8 == 0 else 6
    raw |= {"heads": heads, "kv_heads": 2 if spec.kv_heads < spec.heads else heads, "head_dim": 16}
    if spec.head_dim * spec.heads == spec.hidden:
        raw |= {"hidden": heads * 16}
    if spec.moe is not None:
        raw["moe"] = {**raw["moe"], "experts": 16, "active_experts": 4, "ffn_hidden": 48}
        if spec.moe.shared_ffn_hidden:
            raw["moe"]["shared_ffn_hidden"] = 48
    return spec_from_dict(raw)


def families() -> list[str]:
    """One preset per family (the smallest)."""
    smallest: dict[str, str] = {}
    for name in preset_names():
        family = preset(name).family
        known = smallest.get(family)
        if known is None or count_params(preset(name)) < count_params(preset(known)):
            smallest[family] = name
    return list(smallest.values())


def own_tensors(spec: ArchSpec) -> dict[str, tuple[int, ...]]:
    return {p.name: p.shape for p in iter_params(spec) if p.tied_to is None}


@pytest.mark.parametrize("name", families())
def test_trainer_holds_exactly_these_tensors(name: str) -> None:
    spec = tiny(preset(name))
    if spec.family not in FAMILIES:
        pytest.skip(f"fastllm-train has no {spec.family} model yet")
    with torch.device("meta"):
        model = Decoder(spec)
    held = {key: tuple(value.shape) for key, value in model.named_parameters()}
    assert held == own_tensors(spec)
    assert sum(p.numel() for p in model.parameters()) == count_params(spec)


@pytest.mark.parametrize("name", families())
def test_converter_maps_onto_them_one_to_one(name: str) -> None:
    spec = tiny(preset(name))
    try:
        rows = hf_format.name_table(spec)
    except hf_format.UnsupportedFamily:
        pytest.skip(f"fastllm-convert has no {spec.family} table yet")
    mapped = Counter(canonical for row in rows for canonical in row.canonical)
    assert mapped == Counter(own_tensors(spec).keys()), "not a bijection onto iter_params"
    assert len({row.name for row in rows}) == len(rows), "a Hugging Face name appears twice"


@pytest.mark.parametrize("name", families())
def test_transformers_builds_the_same_model(name: str) -> None:
    spec = tiny(preset(name))
    if spec.family in NOT_IN_TRANSFORMERS:
        pytest.skip(f"transformers has no {spec.family} model")
    raw = to_hf_config(spec)
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    # DeepSeek-V3's routing correction is a buffer there: it is updated, but not by a gradient.
    buffers = sum(b.numel() for n, b in model.named_buffers() if n.endswith("correction_bias"))
    assert sum(p.numel() for p in model.parameters()) + buffers == count_params(spec)


@pytest.mark.parametrize("name", families())
def test_converter_names_are_transformers_names(name: str) -> None:
    spec = tiny(preset(name))
    if spec.family in NOT_IN_TRANSFORMERS or spec.moe is not None:
        pytest.skip("names on disk differ from names in memory, or transformers lacks the family")
    try:
        rows = hf_format.name_table(spec)
    except hf_format.UnsupportedFamily:
        pytest.skip(f"fastllm-convert has no {spec.family} table yet")
    raw = to_hf_config(spec)
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    assert {row.name for row in rows} == {name for name, _ in model.named_parameters()}


def test_every_family_is_covered_somewhere() -> None:
    covered = {preset(name).family for name in families()}
    assert {"llama"} <= covered & set(FAMILIES)
