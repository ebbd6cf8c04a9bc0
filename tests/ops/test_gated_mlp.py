"""A gated feed-forward layer as one operator, against its parts in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastllm_core import _core
from fastllm_planner.arch import spec_from_dict
from fastllm_train.models.kernels import FUSED
from fastllm_train.models.mlp import SwiGLU
from fastllm_train.ops.gated_mlp import gated_mlp

from .accuracy import DTYPES, randoms

Tensors = tuple[torch.Tensor, ...]
SIZES = {
    "layers": 1, "hidden": 128, "heads": 2, "kv_heads": 2, "head_dim": 64, "ffn_hidden": 352,
    "vocab": 64, "max_seq_len": 100,
}  # fmt: skip


def in_parts(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def inputs(dtype: torch.dtype, shape: tuple[int, ...] = (2, 75, 96)) -> Tensors:
    """x, the three weights, the gradient of the output."""
    weight = (160, shape[-1])
    x, gate, up, down, dy = randoms(shape, weight, weight, weight[::-1], shape, dtype=torch.float32)
    return tuple(t.to(dtype) for t in (x, gate / 8, up / 8, down / 8, dy))


@pytest.mark.parametrize("pays", [False, True])
@pytest.mark.parametrize("shape", [(2, 75, 96), (1, 96), (96,), (0, 96)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(
    dtype: torch.dtype, shape: tuple[int, ...], pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_core, "matmul_pays", lambda: pays)
    *tensors, dy = inputs(dtype, shape)
    leaves = [t.requires_grad_() for t in tensors]
    y = gated_mlp(*leaves)
    got = (y, *torch.autograd.grad(y, leaves, dy))
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    z = in_parts(*doubles)
    want = (z, *torch.autograd.grad(z, doubles, dy.double()))
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for a, b in zip(got, want, strict=True):
        assert (a.dtype, a.shape) == (dtype, b.shape)
        if b.numel():
            assert (a.double() - b).abs().max() <= tolerance * b.abs().max() + 1e-6


def test_only_the_gradients_that_are_asked_for() -> None:
    *tensors, dy = inputs(torch.float32)
    all_of_them = [t.clone().requires_grad_() for t in tensors]
    want = torch.autograd.grad(gated_mlp(*all_of_them), all_of_them, dy)
    for place in range(4):
        leaves = [t.clone().requires_grad_(i == place) for i, t in enumerate(tensors)]
        (got,) = torch.autograd.grad(gated_mlp(*leaves), [leaves[place]], dy)
        assert torch.equal(got, want[place])


def test_the_backward_pass_leaves_what_was_kept_as_it_was() -> None:
    *tensors, dy = inputs(torch.float32)
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = gated_mlp(*leaves)
    first = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    again = torch.autograd.grad(y, leaves, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(leaves, tensors, strict=True))


def test_refusals() -> None:
    x, gate, up, down, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"up has shape \(96, 160\)"):
        gated_mlp(x, gate, up.t(), down)
    with pytest.raises(ValueError, match=r"of torch\.bfloat16"):
        gated_mlp(x, gate, up, down.bfloat16())
    with pytest.raises(ValueError, match="x is on meta"):
        gated_mlp(*(t.to("meta") for t in (x, gate, up, down)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_layer_gives_the_same_bits_in_one_and_in_parts(dtype: torch.dtype) -> None:
    spec = spec_from_dict({**SIZES, "family": "llama"})
    layer = SwiGLU(spec, spec.ffn_hidden, FUSED).to(dtype)
    layer.recompute_elementwise = True
    (x,) = randoms((2, 100, spec.hidden), dtype=dtype)
    taken: list[bool] = []
    results: list[list[torch.Tensor]] = []
    for change in ("nothing", "hook"):
        if change == "hook":  # that would not see its layer called
            layer.up_proj.register_forward_hook(lambda *_: None)
        taken.append(layer._in_one(x))
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        gradients = torch.autograd.grad(y.float().square().sum(), [leaf, *layer.parameters()])
        results.append([y, *gradients])
    assert taken == [True, False]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
