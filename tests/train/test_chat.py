"""Instruction tuning: prompts carry no weight, packed chats are trained as if they were apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_models import VARIANTS
from train_layouts import TINY, tiny_config

from fastllm_planner.arch import ArchSpec, spec_from_dict
from fastllm_train.config import build_config
from fastllm_train.data import open_training_data, read_step
from fastllm_train.errors import UserError
from fastllm_train.models.decoder import Decoder, TrainingModel
from fastllm_train.models.initialise import initialise
from fastllm_train.refusals import refuse

ALIBI = {"baichuan, alibi": {"family": "baichuan", "kv_heads": 4, "position": "alibi"}}
PACKED = ["llama", "mistral", "qwen2, window from layer 1", "gpt2", "baichuan, alibi"]
LENGTHS = (5, 14, 3, 10)  # of the documents of a sequence


def spec_of(variant: str) -> ArchSpec:
    return replace(spec_from_dict(TINY), **{**VARIANTS, **ALIBI}[variant])


def packed(spec: ArchSpec) -> tuple[torch.Tensor, ...]:
    """Two sequences of documents: tokens, positions that restart, labels, a mask of responses."""
    draw = torch.Generator().manual_seed(3)
    tokens, labels = (
        torch.randint(spec.vocab, (2, sum(LENGTHS)), generator=draw) for _ in range(2)
    )
    one_row = torch.cat([torch.arange(length) for length in LENGTHS])
    positions = torch.stack((one_row, one_row))
    return tokens, positions, labels, (positions >= 2).double()


def gradients(
    spec: ArchSpec, recompute: str, documents: bool, batches: list[tuple[torch.Tensor, ...]]
) -> tuple[float, dict[str, torch.Tensor]]:
    model = TrainingModel(Decoder(spec, recompute=recompute, documents=documents)).double()
    initialise(model, spec, 1)
    total = 0.0
    for batch in batches:
        loss = model(*batch)
        loss.objective.backward()
        total += float(loss.cross_entropy)
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("variant", PACKED)
def test_packed_documents_train_as_if_apart(variant: str, recompute: str) -> None:
    """In fp64; and without the border between them it would show."""
    spec = spec_of(variant)
    batch = packed(spec)
    apart = [
        tuple(part[row : row + 1] for part in parts)
        for parts in zip(*(t.split(LENGTHS, dim=1) for t in batch), strict=True)
        for row in range(2)
    ]
    loss, grads = gradients(spec, recompute, True, [batch])
    want, expected = gradients(spec, "none", False, apart)
    assert abs(loss - want) <= 1e-12 * want
    total = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, grad in expected.items():
        scale = torch.max(grad.norm(), 1e-3 * total)
        assert (grads[name] - grad).norm() <= 1e-12 * scale, name
    leaking, _ = gradients(spec, recompute, False, [batch])
    assert abs(leaking - want) > 1e-6 * want


def test_prompts_carry_exactly_no_weight() -> None:
    spec = spec_of("llama")
    tokens, positions, labels, mask = packed(spec)
    other = torch.where(mask == 0, (labels + 1) % spec.vocab, labels)
    one, two = (
        gradients(spec, "none", True, [(tokens, positions, x, mask)]) for x in (labels, other)
    )
    assert one[0] == two[0]
    assert all(torch.equal(one[1][name], two[1][name]) for name in one[1])


def test_chats_are_the_config_s_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastllm_data

    asked: dict[str, Any] = {}

    class Chats:
        def __init__(self, prefix: str, seq_len: int, *, seed: int, overlong: str) -> None:
            asked.update(prefix=prefix, seq_len=seq_len, seed=seed, overlong=overlong)

        def __getitem__(self, index: int) -> dict[str, Any]:
            row = torch.arange(32).numpy()
            return {
                "tokens": row + index,
                "labels": row + index + 1,
                "loss_mask": (row > 3).astype("float32"),
                "position_ids": row % 8,
                "cu_seqlens": row[::8],
            }

    monkeypatch.setattr(fastllm_data, "ChatDataset", Chats, raising=False)
    config = tiny_config(data={"source": "chat", "paths": ["a/b"], "overlong": "drop", "seed": 5})
    refuse(config, config.model.resolve())
    source = open_training_data(config.data, config.batch, steps=3, vocab=128)
    assert asked == {"prefix": "a/b", "seq_len": 32, "seed": 5, "overlong": "drop"}
    assert len(source) == 24
    (batch, *_) = read_step(source, 8, config.batch, 1, 0, 128)
    assert batch.tokens[:, 0].tolist() == [8, 9]
    assert batch.position_ids[0].tolist() == [i % 8 for i in range(32)]


def build_and_refuse(table: dict[str, Any]) -> None:
    config = build_config(table)
    refuse(config, config.model.resolve())


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"source": "chat"}}, "takes one prefix"),
        ({"data": {"source": "chat", "paths": ["a", "b"]}}, "takes one prefix"),
        ({"eval": {"every": 5}}, "no validation split"),
    ],
)
def test_refused(sections: dict[str, Any], message: str) -> None:
    table = {
        "model": {"arch": TINY},
        "batch": {"seq_len": 32},
        "data": {"source": "chat", "paths": ["a"]},
        **sections,
    }
    with pytest.raises(UserError, match=message):
        build_and_refuse(table)
