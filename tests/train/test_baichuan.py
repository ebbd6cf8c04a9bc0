"""Baichuan2's gradients: those of formulas whose logits equal the published code's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from train_layouts import tiny_arch

from fastllm_planner.arch import ArchSpec, read_hf_config, spec_from_dict
from fastllm_train.models.decoder import Decoder
from fastllm_train.models.initialise import initialise
from fastllm_train.models.kernels import FUSED, TORCH, Kernels

GOLDEN = Path(__file__).parents[3] / "shared/golden/convert/baichuan2_13b_like"
Weights = dict[str, torch.Tensor]
# Press et al. 2021; six heads: those of four, then every other one of eight.
SLOPES = {
    4: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8],
    6: [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3],
    8: [2.0**-n for n in range(1, 9)],
}


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: torch.Tensor) -> torch.Tensor:
    """x [B, S, n, d], element i with i + d/2 turned by position · 10000^(-2i/d)."""
    half = x.shape[-1] // 2
    rates = 10_000.0 ** (-torch.arange(half) / half)
    angles = (torch.arange(x.shape[1])[:, None] * rates)[:, None, :]
    one, other = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([one * cos - other * sin, other * cos + one * sin], dim=-1)


def formula_logits(spec: ArchSpec, w: Weights, tokens: torch.Tensor) -> torch.Tensor:
    """[B, S, V]; the whole matrix of scores, one head at a time."""
    length = tokens.shape[1]
    back = torch.arange(length)[:, None] - torch.arange(length)
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(spec.layers):
        at = f"model.layers.{layer}."
        normed = rms_norm(x, w[at + "input_layernorm.weight"], spec.norm_eps)
        q, k, v = (
            (normed @ w[f"{at}self_attn.{n}_proj.weight"].T).unflatten(-1, (spec.heads, -1))
            for n in "qkv"
        )
        if spec.position == "rope":
            q, k = turned(q), turned(k)
        mixed: list[torch.Tensor] = []
        for head in range(spec.heads):
            scores = q[:, :, head] @ k[:, :, head].transpose(1, 2) / spec.head_dim**0.5
            if spec.position == "alibi":
                scores = scores - SLOPES[spec.heads][head] * back
            seen = scores.masked_fill(back < 0, float("-inf")).softmax(-1)
            mixed.append(seen @ v[:, :, head])
        x = x + torch.cat(mixed, dim=-1) @ w[at + "self_attn.o_proj.weight"].T
        normed = rms_norm(x, w[at + "post_attention_layernorm.weight"], spec.norm_eps)
        gate, up = (normed @ w[f"{at}mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        x = x + (gate * gate.sigmoid() * up) @ w[at + "mlp.down_proj.weight"].T
    head_weight = w["lm_head.weight"]
    rows = head_weight / head_weight.square().sum(1, keepdim=True).sqrt()
    return rms_norm(x, w["model.norm.weight"], spec.norm_eps) @ rows.T


def published() -> tuple[ArchSpec, Weights]:
    """A small Baichuan2-13B that its authors' code has run."""
    spec = read_hf_config(GOLDEN / "hf")
    state: Weights = {}
    for file in sorted((GOLDEN / "hf").glob("*.bin")):
        state.update(torch.load(file, weights_only=True))
    for name in [n for n in state if n.endswith("W_pack.weight")]:
        parts = state.pop(name).split([spec.q_size, spec.kv_size, spec.kv_size])
        names = [name.replace("W_pack", f"{x}_proj") for x in "qkv"]
        state.update(zip(names, parts, strict=True))
    return spec, {name: value.float() for name, value in state.items()}


def gradients(logits: torch.Tensor, tokens: torch.Tensor, weights: Weights) -> Weights:
    loss = F.cross_entropy(logits.flatten(0, 1), tokens.roll(-1, 1).flatten(), reduction="sum")
    found = torch.autograd.grad(loss, list(weights.values()))
    return dict(zip(weights, found, strict=True))


def assert_same_as_the_formula(spec: ArchSpec, model: Decoder, tokens: torch.Tensor) -> None:
    ours: Weights = dict(model.named_parameters())
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    logits = model(tokens, positions)
    plain = {name: param.detach().clone().requires_grad_() for name, param in ours.items()}
    expected = formula_logits(spec, plain, tokens)
    assert (logits - expected).abs().max() <= 1e-5
    got = gradients(logits, tokens, ours)
    for name, want in gradients(expected, tokens, plain).items():
        assert (got[name] - want).norm() <= 1e-4 * want.norm(), name


@pytest.mark.parametrize("kernels", [TORCH, FUSED], ids=["torch", "fused"])
@pytest.mark.parametrize(("position", "heads"), [("alibi", 4), ("alibi", 6), ("rope", 4)])
def test_gradients_equal_the_formulas(position: str, heads: int, kernels: Kernels) -> None:
    """13B has ALiBi, 7B rotary embeddings."""
    arch = {**tiny_arch("baichuan"), "position": position, "heads": heads, "kv_heads": heads}
    spec = spec_from_dict(arch)
    model = Decoder(spec, kernels=kernels)
    initialise(model, spec, 1)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():  # no norm weight is one: a missing one must show
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.empty_like(param).normal_(0, 0.2, generator=generator))
    assert_same_as_the_formula(spec, model, torch.randint(spec.vocab, (2, 48), generator=generator))


@pytest.mark.shared
def test_the_formulas_logits_and_ours_are_the_published_code_s() -> None:
    """With its weights; gradients through them equal the formulas'."""
    if not GOLDEN.is_dir():
        pytest.skip("needs ../shared/golden")
    spec, weights = published()
    tokens = torch.from_numpy(np.load(GOLDEN / "input_ids.npy"))
    expected = torch.from_numpy(np.load(GOLDEN / "logits_hf.npy"))
    assert (formula_logits(spec, weights, tokens) - expected).abs().max() <= 1e-5
    model = Decoder(spec)
    model.load_state_dict(weights)
    assert_same_as_the_formula(spec, model, tokens)


def test_a_head_that_is_not_normalised_would_be_seen() -> None:
    spec = spec_from_dict(tiny_arch("baichuan"))
    model = Decoder(replace(spec, norm_head=False))
    initialise(model, spec, 1)
    with pytest.raises(AssertionError):
        assert_same_as_the_formula(spec, model, torch.arange(32).view(1, -1))
