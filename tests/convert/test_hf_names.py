"""The convert half of the agreement: each family's table is a bijection onto ``iter_params``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from fastllm_convert.arrays import Array, zeros
from fastllm_convert.dtypes import F32
from fastllm_convert.formats.hf_names import UnsupportedFamily, name_table
from fastllm_convert.layouts import to_canonical, to_format
from fastllm_planner.arch import ArchSpec, iter_params, preset, preset_names


def presets() -> Iterator[str]:
    seen: set[str] = set()
    for name in preset_names():
        family = preset(name).family
        if family not in seen:
            seen.add(family)
            yield name


def blank(spec: ArchSpec) -> dict[str, Array]:
    return {p.name: zeros(p.shape, F32) for p in iter_params(spec) if p.tied_to is None}


@pytest.mark.parametrize("name", list(presets()))
def test_bijection(name: str) -> None:
    spec = preset(name)
    rows = name_table(spec)
    held = Counter(n for row in rows for n in row.canonical)
    assert held == Counter(blank(spec).keys())
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("name", list(presets()))
def test_there_and_back_keeps_every_shape(name: str) -> None:
    spec = preset(name)
    rows, tensors = name_table(spec), blank(spec)
    stored = to_format(rows, tensors)
    back = to_canonical(rows, stored)
    assert {n: a.shape for n, a in back.items()} == {n: a.shape for n, a in tensors.items()}
    assert sum(a.numel for a in stored.values()) == sum(a.numel for a in tensors.values())


def test_all_families_have_a_table() -> None:
    from fastllm_planner.arch.hf_config import family_modules

    assert set(family_modules()) >= {"llama", "gpt2", "mixtral", "baichuan", "qwen2", "mistral"}
    for family in family_modules():
        assert any(preset(n).family == family for n in preset_names()), family


def test_unknown_family(spec: ArchSpec) -> None:
    from dataclasses import replace

    with pytest.raises(UnsupportedFamily):
        name_table(replace(spec, family="elsewhere"))
