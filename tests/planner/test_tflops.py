"""The after-training calculator, against arithmetic done by hand."""

from __future__ import annotations

import json

import pytest

from fastllm_planner.__main__ import main

RUN_7B = "--seq-len 4096 --global-batch 128 --iter-time 6.8 --gpus 32"


def test_the_classic_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tflops", "--params", "7e9", *RUN_7B.split()]) == 0
    captured = capsys.readouterr()
    # 8 · 7e9 · 524288 / (6.8 · 32) / 1e12 = 134.93; 524288 / 6.8 / 32 = 2409.4
    assert captured.out.startswith("2,409 tokens/s per GPU")
    assert "134.93" in captured.out
    assert "101.20" in captured.out  # 6·N
    assert "give --model" in captured.err


def test_named_conventions_of_a_llama_layer_stack(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tflops", "--model", "llama-2-7b", *RUN_7B.split(), "--gpu", "A100", "--json"]
    assert main([*command, "--recompute", "full"]) == 0
    data = json.loads(capsys.readouterr().out)
    # Per token, by hand: layer matmuls 4h² + 3hf, attention 4hs per layer, head Vh.
    h, f, layers, vocab, s = 4096, 11008, 32, 32000, 4096
    linear, head = layers * (4 * h * h + 3 * h * f), vocab * h
    full = 6 * (linear + head) + 12 * layers * h * s
    flops = data["flops_per_token"]
    assert flops["model_full"] == pytest.approx(full)
    assert flops["model_causal"] == pytest.approx(full - 6 * layers * h * s)
    assert flops["hardware"] == pytest.approx(full + 2 * linear + 4 * layers * h * s)
    assert flops["classic"] == 8 * 6_738_415_616
    per_gpu = 128 * 4096 / 6.8 / 32 / 1e12
    assert data["tflops"]["model_full"] == pytest.approx(full * per_gpu)
    assert data["share_of_peak"]["model_full"] == pytest.approx(full * per_gpu / 312)


def test_sc21_equation_3(capsys: pytest.CaptureFixture[str]) -> None:
    """96·B·s·L·h²·(1 + s/6h + V/16Lh): hardware FLOPs of GPT-3 175B with full recomputation."""
    shape = "--seq-len 2048 --global-batch 1536 --iter-time 10 --gpus 1024 --recompute full --json"
    assert main(["tflops", "--model", "gpt3-175b", *shape.split()]) == 0
    data = json.loads(capsys.readouterr().out)
    h, layers, vocab, s = 12288, 96, 51200, 2048
    equation = 96 * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    assert data["flops_per_token"]["hardware"] == pytest.approx(equation, rel=1e-12)


def test_a_mixture_counts_its_active_experts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tflops", "--model", "mixtral-8x7b", *RUN_7B.split(), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["params"] == 12_879_925_248
    assert data["share_of_peak"] is None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--params"),
        (["--params", "0"], "--params"),
        (["--params", "7e9", "--iter-time", "0"], "--iter-time"),
        (["--params", "7e9", "--gpu", "A1000"], "A100"),
    ],
)
def test_bad_input(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tflops", *RUN_7B.split(), *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
