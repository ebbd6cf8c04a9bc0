"""`make gpu-check` without a GPU: it says so, and its Python runs with the CPU in its place."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/gpu_check.py"
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks/ops")]

import gpu_check  # noqa: E402
import peers  # noqa: E402
from cubins import MissingTool  # noqa: E402


def check(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | ({} if path is None else {"PATH": path})
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_dry_run() -> None:
    done = check("--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("dry run on the CPU: tests ok, sanitizer ok, bench ok\n")
    assert "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("smi", "says"),
    [
        (None, "no NVIDIA GPU: there is no nvidia-smi"),
        ("echo No devices were found; exit 6", "no NVIDIA GPU: nvidia-smi: No devices were found"),
        ("echo 'Tesla K80, N/A'", "nvidia-smi says 'Tesla K80, N/A'"),
    ],
    ids=["no driver", "no device", "old"],
)
def test_without_a_gpu(tmp_path: Path, smi: str | None, says: str) -> None:
    if smi is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{smi}\n")
        program.chmod(0o755)
    done = check(path=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    error, hint = done.stderr.splitlines()
    assert error == f"error: {says}"
    assert hint.startswith("hint: ")


def test_gpus_are_read_from_nvidia_smi() -> None:
    gpu = gpu_check.parse_gpu("NVIDIA H100 80GB HBM3, 9.0\n")
    assert gpu == gpu_check.Gpu("NVIDIA H100 80GB HBM3", "90")
    assert gpu.file_name == "nvidia-h100-80gb-hbm3"
    with pytest.raises(MissingTool):
        gpu_check.parse_gpu("")


@pytest.mark.parametrize(
    ("architecture", "cutlass", "option"),
    [("90", Path("/c"), "ON"), ("75", Path("/c"), "OFF"), ("90", None, "OFF")],
)
def test_build_is_for_this_gpu(architecture: str, cutlass: Path | None, option: str) -> None:
    command = gpu_check.build_command(gpu_check.Gpu("x", architecture), cutlass)
    assert f"cmake.define.FASTLLM_CUDA_ARCHITECTURES={architecture}" in command
    assert f"cmake.define.FASTLLM_CUTLASS={option}" in command


# --- other libraries ---------------------------------------------------------------------------


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, x.shape[1:], weight, eps)


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    return F.layer_norm(x, x.shape[1:], weight, bias, eps)


def rotary(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    assert cos.shape == sin.shape == (x.shape[1], x.shape[3] // 2)
    del interleaved
    return x


# Their functions' signatures (Liger 0.6, flash-attn 2.8), with torch behind them.
STAND_INS: dict[str, dict[str, Callable[..., Any]]] = {
    "liger_kernel.transformers.functional": {
        "liger_rms_norm": lambda X, W, eps, offset=0.0, casting_mode="llama", in_place=True: (
            rms_norm(X, W, eps)
        ),
        "liger_fused_add_rms_norm": (
            lambda X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True: rms_norm(
                X + R, W, eps
            )
        ),
        "liger_layer_norm": layer_norm,
        "liger_softmax": lambda x: x.softmax(-1),
        "liger_swiglu": lambda a, b: F.silu(a) * b,
        "liger_geglu": lambda a, b: F.gelu(a, approximate="tanh") * b,
        "liger_cross_entropy": lambda input, target, reduction="mean": F.cross_entropy(
            input, target, reduction=reduction
        ),
    },
    "flash_attn.ops.triton.layer_norm": {
        "rms_norm_fn": lambda x, weight, bias, residual=None, eps=1e-6, prenorm=False: rms_norm(
            x, weight, eps
        ),
        "layer_norm_fn": lambda x, weight, bias, residual=None, eps=1e-6, prenorm=False: layer_norm(
            x, weight, bias, eps
        ),
    },
    "flash_attn.ops.triton.cross_entropy": {
        "cross_entropy_loss": lambda logits, labels: (
            F.cross_entropy(logits, labels, reduction="none"),
            None,
        )
    },
    "flash_attn.ops.activations": {"swiglu": lambda x, y: F.silu(x) * y},
    "flash_attn.layers.rotary": {"apply_rotary_emb": rotary},
}


@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_are_called_where_installed(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    make = peers.PEERS[name]
    monkeypatch.setattr(peers, "library", lambda module: None)
    assert make(32, 64, torch.bfloat16) == {}

    def installed(module: str) -> ModuleType:
        found = ModuleType(module)
        vars(found).update(STAND_INS[module])
        return found

    monkeypatch.setattr(peers, "library", installed)
    calls = make(32, 64, torch.bfloat16)
    assert {"rmsnorm fwd", "rmsnorm bwd / fwd+bwd", "cross_entropy fwd"} <= calls.keys()
    from cases import OPERATORS

    cases = [case.name for make in OPERATORS for case in make(8, 64, "bf16", torch.bfloat16)]
    assert {f"{kind} bf16" for kind in calls} <= set(cases)
    for call in calls.values():
        assert call() is not None
