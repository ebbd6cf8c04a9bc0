"""Attention cores against the definition, pair by pair: windows, ALiBi, documents, both cores."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import flash_attn_stand_in
import pytest
import torch
from test_chat import PACKED, packed, spec_of
from train_layouts import tiny_config

from fastllm_train.errors import UserError
from fastllm_train.models.attention import alibi_slopes
from fastllm_train.models.attention_core import (
    ROWS,
    AttentionMask,
    Core,
    FlashAttention,
    attend,
    attention_core,
    document_matrix,
    find_documents,
    fused_attend,
    name_of_core,
    sight_table,
)
from fastllm_train.models.decoder import Decoder, TrainingModel
from fastllm_train.models.initialise import initialise
from fastllm_train.refusals import refuse
from fastllm_train.speed import SpeedConfig
from fastllm_train.trace.tracer import MemoryTracer

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
SLOPES = torch.tensor(alibi_slopes(HEADS))
WHOLE, ONE_BY_ONE = (2 * ROWS + 45,), (1, 300, ROWS, 1, 10)


def documents_of(lengths: tuple[int, ...]) -> torch.Tensor:
    """Positions of two rows: the documents in this order and in the opposite one."""
    rows = [[torch.arange(n) for n in order] for order in (lengths, lengths[::-1])]
    return torch.stack([torch.cat(row) for row in rows])


Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def inputs(length: int, dtype: torch.dtype = torch.float64) -> Tensors:
    draw = torch.Generator().manual_seed(5)
    shapes = [(2, length, heads, WIDTH) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    q, k, v = (torch.randn(s, generator=draw, dtype=torch.float64).to(dtype) for s in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_()


def by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    window: int | None,
    slopes: torch.Tensor | None,
    positions: torch.Tensor,
) -> torch.Tensor:
    """All pairs, in fp64."""
    q, k, v = q.double(), *(x.double().repeat_interleave(HEADS // KEY_HEADS, 2) for x in (k, v))
    place = torch.arange(q.shape[1])
    document = (positions == 0).cumsum(1)
    distance = place[:, None] - place
    seen = (document[:, :, None] == document[:, None]) & (distance >= 0)
    if window is not None:
        seen = seen & (distance < window)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(WIDTH)
    if slopes is not None:
        scores = scores - slopes.double()[:, None, None] * distance
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def with_gradients(function: Callable[[], torch.Tensor], tensors: Tensors) -> list[torch.Tensor]:
    out = function()
    # A weight of its own for each output, so that no gradient vanishes by symmetry.
    weight = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), tensors)]


def core_of(name: str) -> Core:
    if name == "attend":
        return attend
    return FlashAttention(flash_attn_stand_in, deterministic=True, takes=lambda _: True)


@pytest.mark.parametrize("lengths", [WHOLE, ONE_BY_ONE], ids=["whole", "documents"])
@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["", "alibi"])
@pytest.mark.parametrize("window", [None, 1, 100, ROWS + 3, 1000])
@pytest.mark.parametrize("name", ["attend", "flash"])
def test_cores_equal_the_definition_in_fp64(
    name: str, window: int | None, slopes: torch.Tensor | None, lengths: tuple[int, ...]
) -> None:
    """Values and gradients, where rows do not divide by a block of them."""
    positions = documents_of(lengths)
    found = find_documents(positions) if len(lengths) > 1 else None
    tensors = inputs(positions.shape[1])
    mask = AttentionMask(window, slopes, found)
    if window == 100:  # made before
        table = sight_table(mask, max(lengths), torch.float64, positions.device)
        mask = mask._replace(table=table)
    got = with_gradients(lambda: core_of(name)(*tensors, mask), tensors)
    want = with_gradients(lambda: by_definition(*tensors, window, slopes, positions), tensors)
    for a, b in zip(got, want, strict=True):  # a window of one leaves the scores no gradient
        assert (a - b).norm() <= 1e-12 * max(b.norm().item(), 1.0)


@pytest.mark.parametrize("slopes", [None, SLOPES], ids=["window", "alibi"])
def test_bf16_is_as_near_as_its_rounding(slopes: torch.Tensor | None) -> None:
    positions = documents_of(WHOLE)
    tensors = inputs(positions.shape[1], torch.bfloat16)
    window = None if slopes is not None else 100
    got = with_gradients(lambda: attend(*tensors, AttentionMask(window, slopes)), tensors)
    want = with_gradients(lambda: by_definition(*tensors, window, slopes, positions), tensors)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm()


def test_a_dense_matrix_says_the_same() -> None:
    """What compiled layers take."""
    positions = documents_of(ONE_BY_ONE)
    tensors = inputs(positions.shape[1])
    for window in (None, 100):
        dense = attend(*tensors, AttentionMask(dense=document_matrix(positions, window)))
        want = attend(*tensors, AttentionMask(window, None, find_documents(positions)))
        assert (dense - want).norm() <= 1e-12 * want.norm()


@pytest.mark.parametrize(
    "mask",
    [AttentionMask(window=100), AttentionMask(slopes=SLOPES)],
    ids=["window", "alibi"],
)
@pytest.mark.parametrize("documents", [False, True])
def test_memory_grows_with_the_length_not_with_its_square(
    mask: AttentionMask, documents: bool
) -> None:
    def peak(length: int) -> int:
        tensors = inputs(length, torch.bfloat16)
        positions = documents_of((length // 2, length // 2) if documents else (length,))
        with MemoryTracer() as tracer:
            found = mask._replace(documents=find_documents(positions) if documents else None)
            attend(*tensors, found).sum().backward()
        return tracer.peak.total

    peak(512)
    assert peak(4096) <= 2.2 * peak(2048)


def gradients(variant: str, core: Core, documents: bool) -> dict[str, torch.Tensor]:
    spec = spec_of(variant)
    model = TrainingModel(Decoder(spec, core=core, documents=documents)).double()
    initialise(model, spec, 1)
    model(*packed(spec)).objective.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("variant", PACKED)
def test_models_through_flash_attn_are_the_same(variant: str, documents: bool) -> None:
    flash_attn_stand_in.calls.clear()
    got = gradients(variant, core_of("flash"), documents)
    calls = flash_attn_stand_in.calls
    kind = "packed" if documents else "whole"
    assert calls == [f"{kind}, deterministic=True"] * spec_of(variant).layers
    want = gradients(variant, attend, documents)
    total = torch.stack([g.norm() for g in want.values()]).norm()
    for name, grad in want.items():
        scale = torch.max(grad.norm(), 1e-3 * total)
        assert (got[name] - grad).norm() <= 1e-12 * scale, name


def test_flash_attn_is_taken_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # not installed
    assert attention_core(SpeedConfig()) is fused_attend
    assert attention_core(SpeedConfig(kernels="torch")) is attend
    old = SimpleNamespace(
        flash_attn_func=lambda q, k, v: q, flash_attn_varlen_func=lambda q, k, v, causal: q
    )
    monkeypatch.setitem(sys.modules, "flash_attn", old)
    assert attention_core(SpeedConfig()) is fused_attend
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn_stand_in)
    assert attention_core(SpeedConfig(attention="sdpa")) is attend
    core = attention_core(SpeedConfig(deterministic=False))
    assert isinstance(core, FlashAttention)
    assert (name_of_core(core), name_of_core(attend)[:5]) == ("flash-attn 2.8.3", "torch")
    # It has no kernels for a CPU.
    flash_attn_stand_in.calls.clear()
    tensors = inputs(9, torch.bfloat16)
    mask = AttentionMask(slopes=SLOPES)
    assert torch.equal(core(*tensors, mask), attend(*tensors, mask))
    assert not flash_attn_stand_in.calls


def test_compiled_chats_under_alibi_are_refused() -> None:
    spec: Any = spec_of("baichuan, alibi")
    config = tiny_config(
        data={"source": "chat", "paths": ["a"]}, speed={"compile": True}, eval={"every": 0}
    )
    with pytest.raises(UserError, match="one by one"):
        refuse(config, spec)
    refuse(replace(config, speed=replace(config.speed, compile=False)), spec)
