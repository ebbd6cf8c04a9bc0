"""A tiny model, unevenly weighted samples and a plain one-process reference to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastllm_planner.arch import ArchSpec
from fastllm_train.config import Config, build_config
from fastllm_train.data import Sample, read_step
from fastllm_train.layout import BatchConfig
from fastllm_train.models.decoder import Decoder, TrainingModel
from fastllm_train.models.initialise import initialise
from fastllm_train.optimizer import build_optimizer, parameter_groups
from fastllm_train.schedule import learning_rate

TINY: dict[str, Any] = {
    "family": "llama",
    "layers": 2,
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "ffn_hidden": 96,
    "vocab": 128,
    "max_seq_len": 64,
}
# What each family changes of TINY. LLaMA has fewer key/value heads than 4 tensor-parallel ranks;
# Baichuan2-13B has ALiBi and NormHead; GPT-2 ties its embeddings and has biases.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "baichuan": {"family": "baichuan", "kv_heads": 4, "position": "alibi", "norm_head": True},
    "gpt2": {
        "family": "gpt2",
        "kv_heads": 4,
        "mlp": "gelu",
        "norm": "layernorm",
        "position": "learned",
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "tied_embeddings": True,
    },
    "mixtral": {
        "family": "mixtral",
        "moe": {"experts": 6, "active_experts": 2, "ffn_hidden": 48},
    },
}
ADAMW: dict[str, Any] = {
    # eps well above a gradient's rounding: Adam would blow that up to a whole update.
    "name": "adamw",
    "lr": 3e-3,
    "clip": 0.1,
    "weight_decay": 0.1,
    "eps": 1e-5,
}


def tiny_arch(family: str, layers: int = 2) -> dict[str, Any]:
    """TINY as a member of ``FAMILIES``."""
    return {**TINY, "layers": layers, **FAMILIES[family]}


class UnevenSamples:
    """Random tokens; sample i weighs between none and all of its tokens, so that a mean of means
    is far from the token-weighted mean."""

    def __init__(self, count: int, seq_len: int, vocab: int) -> None:
        self._count, self._seq_len, self._vocab = count, seq_len, vocab

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Sample:
        draw = np.random.default_rng((99, index))
        walk = draw.integers(self._vocab, size=self._seq_len + 1)
        mask = np.zeros(self._seq_len, dtype=np.float32)
        mask[: (index * 7) % (self._seq_len + 1)] = 1.0
        return {
            "tokens": walk[:-1],
            "labels": walk[1:],
            "loss_mask": mask,
            "position_ids": np.arange(self._seq_len),
        }


class PackedSamples:
    """Each of ``samples`` as three documents, the first two tokens of each not learnt."""

    def __init__(self, samples: UnevenSamples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        sample = self._samples[index]
        length = len(sample["tokens"])
        ends = (length // 4 + index % 3, length // 2 + index % 5)
        parts = np.split(np.arange(length), ends)
        positions = np.concatenate([np.arange(len(part)) for part in parts])
        mask = sample["loss_mask"] * (positions >= 2)
        return {**sample, "position_ids": positions, "loss_mask": mask.astype(np.float32)}


def tiny_config(**sections: dict[str, Any]) -> Config:
    """A config of the tiny model; ``sections`` are merged over defaults that make clipping act.
    Through DeepSpeed, unless they say so: ``test_engine_torch`` has the other engine's layouts."""
    table: dict[str, dict[str, Any]] = {
        "model": {"arch": TINY},
        "parallel": {"dp": 1, "zero_stage": 0},
        "batch": {"micro": 2, "global": 8, "seq_len": 32},
        "data": {"source": "synthetic"},
        "optim": {"name": "sgd", "lr": 1.0, "clip": 0.1, "weight_decay": 0.0},
        "schedule": {"kind": "constant", "steps": 5},
        "speed": {"engine": "deepspeed"},
        "run": {"device": "cpu", "out": "unused"},
    }
    for name, values in sections.items():
        table[name] = {**table.get(name, {}), **values}
    return build_config(table)


def samples_of(config: Config, spec: ArchSpec) -> UnevenSamples:
    count = config.batch.global_size * config.schedule.steps
    return UnevenSamples(count, config.batch.seq_len, spec.vocab)


@dataclass(frozen=True)
class Trajectory:
    """Loss and gradient norm of every step, and the fp32 weights at the end; how many tensors that
    tensor-parallel ranks hold in copies are then not equal to the bit. ``steps_before``: the count
    of Adam's steps before the first one."""

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    unequal: int = 0
    steps_before: int = 0


def reference(
    config: Config, *, mean_of_means: bool = False, dtype: torch.dtype = torch.float32
) -> Trajectory:
    """Plain torch in one process: the whole global batch at once, weighted by tokens.

    ``dtype`` bfloat16 runs the model in bf16 with an fp32 master copy that the optimizer updates.
    """
    spec = config.model.resolve()
    model = TrainingModel(Decoder(spec))
    initialise(model, spec, config.run.seed)
    model = model.to(dtype)
    masters = [torch.nn.Parameter(p.detach().float().clone()) for p in model.parameters()]
    named = zip((n for n, _ in model.named_parameters()), masters, strict=True)
    groups = parameter_groups(named, config.optim.weight_decay)
    optimizer = build_optimizer(config.optim, groups)
    source = samples_of(config, spec)
    whole = BatchConfig(config.batch.global_size, config.batch.global_size, config.batch.seq_len)
    losses: list[float] = []
    norms: list[float] = []
    for step in range(1, config.schedule.steps + 1):
        (batch,) = read_step(source, (step - 1) * whole.micro, whole, 1, 0, spec.vocab)
        tokens, positions, labels, mask = (
            torch.from_numpy(a)
            for a in (batch.tokens, batch.position_ids, batch.labels, batch.loss_mask)
        )
        if mean_of_means:
            mask = mask / mask.sum(dim=1, keepdim=True).clamp(min=1) / len(mask) * mask.sum()
        loss = model(tokens, positions, labels, mask)
        model.zero_grad()
        (loss.objective / mask.sum()).backward()
        for master, param in zip(masters, model.parameters(), strict=True):
            assert param.grad is not None
            master.grad = param.grad.float()
        bound = config.optim.clip or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(masters, bound)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.schedule, config.optim.lr, step)
        optimizer.step()
        with torch.no_grad():
            for master, param in zip(masters, model.parameters(), strict=True):
                param.copy_(master)
        losses.append((loss.cross_entropy / mask.sum()).item())
    names = [name for name, _ in model.named_parameters()]
    weights = {n: m.detach().clone() for n, m in zip(names, masters, strict=True)}
    return Trajectory(losses, norms, weights)


def assert_same_training(got: Trajectory, want: Trajectory) -> None:
    """In fp32: what rounding explains and no more."""
    assert got.steps_before == 0
    np.testing.assert_allclose(got.losses, want.losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(got.norms, want.norms, rtol=1e-5)
    assert list(got.weights) == list(want.weights)
    for name, weight in want.weights.items():
        torch.testing.assert_close(got.weights[name], weight, rtol=1e-4, atol=1e-6, msg=name)
    assert got.unequal == 0


def assert_same_bf16_training(got: Trajectory, want: Trajectory) -> None:
    """In bf16 with fp32 masters, against the reference in that precision."""
    assert got.steps_before == 0
    assert_same_bf16_curve(got, want)


def assert_same_bf16_curve(got: Trajectory, want: Trajectory) -> None:
    """What of it the losses and norms alone say."""
    np.testing.assert_allclose(got.losses[0], want.losses[0], rtol=0, atol=1e-3)
    np.testing.assert_allclose(got.losses, want.losses, rtol=0, atol=5e-3)
    np.testing.assert_allclose(got.norms[:5], want.norms[:5], rtol=2e-2)
    assert got.unequal == 0
