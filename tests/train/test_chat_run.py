"""Chats from ``fastllm-data tokenize-chat`` to ``fastllm-train run``, and what packing changes."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_layouts import TINY

from fastllm_data import ChatDataset
from fastllm_data.__main__ import main as data
from fastllm_planner.arch import spec_from_dict
from fastllm_train.models.decoder import Decoder, TrainingModel
from fastllm_train.models.initialise import initialise
from fastllm_train.toml_text import to_toml

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' }}{{ message['content'] }}{{ '<|im_end|>' + '\n' }}
{%- endfor %}"""
WORDS = "what is the capital of France ? Paris 12345 def f(x): return x".split(" ")
SEQ_LEN, VOCAB = 128, 300


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Tokenized chats, by the command."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("chats")
    hf = Tokenizer(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator([" ".join(WORDS), "user assistant\n"] * 50, trainer)
    hf.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    rng = random.Random(1)

    def says(role: str) -> dict[str, str]:
        words = rng.choices(WORDS, k=rng.choice((1, 4, 12)))
        return {"role": role, "content": " ".join(words)}

    chats = [{"messages": [says("user"), says("assistant")]} for _ in range(60)]
    source = folder / "chats.jsonl"
    source.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    out = folder / "sft"
    arguments = ["tokenize-chat", str(source), "--tokenizer", str(folder), "--out", str(out)]
    assert data(arguments) == 0
    return str(out)


def gradients(
    samples: list[dict[str, Any]], *, documents: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Sums over ``samples``, each a sequence, in fp64."""
    spec = spec_from_dict({**TINY, "vocab": VOCAB, "max_seq_len": SEQ_LEN})
    model = TrainingModel(Decoder(spec, documents=documents)).double()
    initialise(model, spec, 1)
    total = 0.0
    for sample in samples:
        loss = model(
            *(torch.from_numpy(sample[k])[None] for k in ("tokens", "position_ids", "labels")),
            torch.from_numpy(sample["loss_mask"])[None].double(),
        )
        loss.objective.backward()
        total += float(loss.cross_entropy)
    return total, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def chats_of(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """The sequences that were packed into ``sample``, each alone."""
    borders = sample["cu_seqlens"]
    names = ("tokens", "labels", "loss_mask", "position_ids")
    return [
        {name: sample[name][start:end] for name in names}
        for start, end in itertools.pairwise(borders)
    ]


def test_packed_chats_train_as_if_alone_and_prompts_not_at_all(prefix: str) -> None:
    packed = ChatDataset(prefix, SEQ_LEN, seed=3)
    samples: list[dict[str, Any]] = [dict(packed[index]) for index in range(3)]
    alone = [chat for sample in samples for chat in chats_of(sample)]
    assert len(alone) > 2 * len(samples)
    loss, grads = gradients(samples, documents=True)
    want, expected = gradients(alone, documents=False)
    assert abs(loss - want) <= 1e-12 * want
    total = torch.stack([grad.norm() for grad in expected.values()]).norm()
    for name, grad in expected.items():
        scale = torch.max(grad.norm(), 1e-3 * total)
        assert (grads[name] - grad).norm() <= 1e-12 * scale, name

    prompts = [sample["loss_mask"] == 0 for sample in samples]
    assert all(prompt.any() and not prompt.all() for prompt in prompts)
    other: list[dict[str, Any]] = [
        {**sample, "labels": np.where(prompt, (sample["labels"] + 1) % VOCAB, sample["labels"])}
        for sample, prompt in zip(samples, prompts, strict=True)
    ]
    changed, others = gradients(other, documents=True)
    assert changed == loss
    assert all(torch.equal(others[name], grad) for name, grad in grads.items())


LAYOUTS: dict[str, dict[str, Any]] = {"one": {}, "pp2": {"pp": 2}, "cp2": {"cp": 2}}


def run(folder: Path, prefix: str, layout: dict[str, Any]) -> list[float]:
    config = {
        "model": {"arch": {**TINY, "vocab": VOCAB, "max_seq_len": SEQ_LEN}},
        "parallel": {"zero_stage": 1, **layout},
        "batch": {"micro": 1, "global": 4, "seq_len": SEQ_LEN},
        "data": {"source": "chat", "paths": [prefix]},
        "schedule": {"steps": 4},
        "optim": {"lr": 3e-3},
        "run": {"device": "cpu", "out": str(folder / "run")},
    }
    path = folder / "config.toml"
    path.write_text(to_toml(config))
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    done = subprocess.run(
        [sys.executable, "-m", "fastllm_train", "run", str(path)],
        env={**{k: v for k, v in os.environ.items() if k not in left_out}, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (folder / "run/metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if record["kind"] == "step"]


@pytest.mark.slow
def test_every_layout_trains_the_same_from_the_command_line(prefix: str, tmp_path: Path) -> None:
    losses: dict[str, list[float]] = {}
    for name, layout in LAYOUTS.items():
        (tmp_path / name).mkdir()
        losses[name] = run(tmp_path / name, prefix, layout)
    assert len(losses["one"]) == 4
    assert losses["pp2"] == pytest.approx(losses["one"], abs=1e-5)
    assert losses["cp2"] == pytest.approx(losses["one"], abs=1e-5)
