"""The same operators in other libraries, where they are installed: Liger, flash-attn's own ops.

Keys are the names of the cases of cases.py without the dtype. Each function makes what it returns,
as the libraries' users call them; inputs are of the cases' shapes and dtype.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

Call = Callable[[], object]
EPS = 1e-6


def library(name: str) -> ModuleType | None:
    """The module, or None where it is not installed or does not load on this machine."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError):
        return None


def both_ways(function: Callable[..., Any], *inputs: torch.Tensor) -> tuple[Call, Call]:
    """Forward, and forward with backward, of a function of these tensors."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.no_grad():
        dy = torch.randn_like(function(*inputs))
    return (
        lambda: function(*inputs),
        lambda: torch.autograd.grad(function(*leaves), leaves, dy),
    )


def liger(rows: int, cols: int, dtype: torch.dtype) -> dict[str, Call]:
    functions = library("liger_kernel.transformers.functional")
    if functions is None:
        return {}
    x, residual, gate, up = (torch.randn(rows, cols).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(cols).to(dtype) for _ in range(2))
    logits, labels = classification(rows, cols, dtype)
    found: dict[str, Call] = {
        "rmsnorm residual fwd": lambda: functions.liger_fused_add_rms_norm(
            x, residual, weight, EPS, in_place=False
        ),
        "softmax fwd": lambda: functions.liger_softmax(x),
    }
    pairs = {
        "rmsnorm": both_ways(
            lambda x, w: functions.liger_rms_norm(x, w, EPS, in_place=False), x, weight
        ),
        "layernorm": both_ways(
            lambda x, w, b: functions.liger_layer_norm(x, w, b, EPS), x, weight, bias
        ),
        "swiglu": both_ways(functions.liger_swiglu, gate, up),
        "geglu": both_ways(functions.liger_geglu, gate, up),
        # Computes the gradient with the loss whenever the logits want one.
        "cross_entropy": both_ways(
            lambda x: functions.liger_cross_entropy(x, labels, reduction="none"), logits
        ),
    }
    return found | named(pairs)


def flash_attn(rows: int, cols: int, dtype: torch.dtype) -> dict[str, Call]:
    found: dict[str, Call] = {}
    pairs: dict[str, tuple[Call, Call]] = {}
    x, residual, gate, up = (torch.randn(rows, cols).to(dtype) for _ in range(4))
    weight, bias = (torch.randn(cols).to(dtype) for _ in range(2))
    norms = library("flash_attn.ops.triton.layer_norm")
    if norms is not None:
        pairs["rmsnorm"] = both_ways(lambda x, w: norms.rms_norm_fn(x, w, None, eps=EPS), x, weight)
        pairs["layernorm"] = both_ways(
            lambda x, w, b: norms.layer_norm_fn(x, w, b, eps=EPS), x, weight, bias
        )
        found["rmsnorm residual fwd"] = lambda: norms.rms_norm_fn(
            x, weight, None, residual=residual, eps=EPS, prenorm=True
        )
        found["layernorm residual fwd"] = lambda: norms.layer_norm_fn(
            x, weight, bias, residual=residual, eps=EPS, prenorm=True
        )
    losses = library("flash_attn.ops.triton.cross_entropy")
    if losses is not None:
        logits, labels = classification(rows, cols, dtype)
        pairs["cross_entropy"] = both_ways(
            lambda x: losses.cross_entropy_loss(x, labels)[0], logits
        )
    rotary = library("flash_attn.layers.rotary")
    if rotary is not None:
        head_dim = min(128, cols)
        heads = torch.randn(1, rows, cols // head_dim, head_dim).to(dtype)
        angle = torch.rand(rows, head_dim // 2)
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        for name, interleaved in (("rope", False), ("rope interleaved", True)):
            found[name] = lambda i=interleaved: rotary.apply_rotary_emb(heads, cos, sin, i)
    activations = library("flash_attn.ops.activations")
    if activations is not None and hasattr(activations, "swiglu"):
        pairs["swiglu"] = both_ways(activations.swiglu, gate, up)
    return found | named(pairs)


def named(pairs: dict[str, tuple[Call, Call]]) -> dict[str, Call]:
    found: dict[str, Call] = {}
    for name, (forward, both) in pairs.items():
        found[f"{name} fwd"] = forward
        found[f"{name} bwd / fwd+bwd"] = both
    return found


def classification(rows: int, cols: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and labels of the sizes of cases.cross_entropy_cases."""
    vocabulary = min(32768, rows * cols // 4)
    rows = rows * cols // vocabulary
    return torch.randn(rows, vocabulary).to(dtype), torch.randint(0, vocabulary, (rows,))


PEERS = {"liger": liger, "flash-attn": flash_attn}
