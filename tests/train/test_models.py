"""The model: parameters equal the architecture's, logits and gradients equal Hugging Face's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from train_layouts import TINY

from fastllm_planner.arch import ArchSpec, RopeSpec, iter_params, spec_from_dict, to_hf_config
from fastllm_train.errors import UserError
from fastllm_train.models.decoder import Decoder, assert_parameters
from fastllm_train.models.initialise import initial_value, initialise
from fastllm_train.models.supported import check_supported

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one head each": {"kv_heads": 4},
    "biases": {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "tied": {"tied_embeddings": True},
    "wide heads": {"head_dim": 32},
    "llama3 rope": {"rope": RopeSpec(10_000.0, tuple(LLAMA3_SCALING.items()))},
    "linear rope": {"rope": RopeSpec(5e5, (("rope_type", "linear"), ("factor", 4.0)))},
}


def spec_of(variant: str) -> ArchSpec:
    return replace(spec_from_dict(TINY), **VARIANTS[variant])


def built(spec: ArchSpec, seed: int = 1) -> Decoder:
    model = Decoder(spec)
    initialise(model, spec, seed)
    with torch.no_grad():  # no all-ones and all-zeros: a missing norm or bias must show
        for name, param in model.named_parameters():
            if param.ndim == 1:
                generator = torch.Generator().manual_seed(len(name))
                param.add_(torch.empty_like(param).normal_(0, 0.2, generator=generator))
    return model


def hugging_face(spec: ArchSpec, model: Decoder) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = to_hf_config(spec)
    config = AutoConfig.for_model(**raw)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert not missing
    return theirs.float().eval()


def batch(spec: ArchSpec) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(spec.vocab, (2, 48), generator=generator)
    positions = torch.arange(48).expand(2, -1)
    return tokens, positions, tokens.roll(-1, dims=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_hugging_face(variant: str) -> None:
    spec = spec_of(variant)
    model = built(spec)
    theirs = hugging_face(spec, model)
    tokens, positions, labels = batch(spec)
    logits = model(tokens, positions)
    expected = theirs(tokens).logits
    assert (logits - expected).abs().max() <= 1e-5
    model(tokens, positions, labels).backward()
    torch.nn.functional.cross_entropy(
        expected.flatten(0, 1), labels.flatten(), reduction="sum"
    ).backward()
    their_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, param in model.named_parameters():
        grad = their_grads[name]
        assert grad is not None
        assert param.grad is not None
        error = (param.grad - grad).norm() / grad.norm()
        assert error <= 1e-4, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_equal_the_architecture(variant: str) -> None:
    spec = spec_of(variant)
    model = Decoder(spec)
    assert_parameters(model, spec)
    stored = {p.name for p in iter_params(spec)}
    assert set(model.state_dict()) == stored


def test_a_differing_parameter_is_named() -> None:
    spec = spec_of("grouped queries")
    model = Decoder(replace(spec, ffn_hidden=97))
    with pytest.raises(AssertionError, match=r"differ in 6.*down_proj.weight: arch \(64, 96\)"):
        assert_parameters(model, spec)


def test_position_ids_turn_the_rotation() -> None:
    spec = spec_of("grouped queries")
    model = built(spec)
    tokens, positions, _ = batch(spec)
    shifted = model(tokens, positions + 5)  # rotary attention sees distances only
    assert torch.allclose(model(tokens, positions), shifted, atol=1e-5)
    restarted = positions.clone()
    restarted[:, 24:] -= 24
    assert not torch.allclose(model(tokens, positions), model(tokens, restarted), atol=1e-3)


def test_loss_is_the_weighted_sum_in_fp32() -> None:
    spec = spec_of("grouped queries")
    model = built(spec)
    tokens, positions, labels = batch(spec)
    mask = torch.zeros(tokens.shape)
    mask[0, 3], mask[1, 9] = 1.0, 0.5
    loss = model(tokens, positions, labels, mask).item()
    logp = model(tokens, positions).log_softmax(-1)
    expected = -(logp[0, 3, labels[0, 3]] + 0.5 * logp[1, 9, labels[1, 9]])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    half = model.bfloat16()(tokens, positions, labels, mask)
    assert half.dtype == torch.float32


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute_changes_no_gradient(recompute: str) -> None:
    spec = spec_of("grouped queries")
    grads: list[dict[str, torch.Tensor]] = []
    for mode in ("none", recompute):
        model = Decoder(spec, recompute=mode).double()
        initialise(model, spec, 1)
        model(*batch(spec)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        assert (grads[1][name] - grad).norm() <= 1e-12 * grad.norm(), name


def test_initial_values_follow_the_name_and_the_seed_alone() -> None:
    spec = spec_of("grouped queries")
    params = {p.name: p for p in iter_params(spec)}
    query = params["model.layers.0.self_attn.q_proj.weight"]
    one = initial_value(spec, query, seed=1)
    assert torch.equal(one, initial_value(replace(spec, layers=2), query, seed=1))
    assert not torch.equal(one, initial_value(spec, query, seed=2))
    other = params["model.layers.1.self_attn.q_proj.weight"]
    assert not torch.equal(one, initial_value(spec, other, seed=1))


def test_initial_spread() -> None:
    spec = replace(spec_of("biases"), hidden=256, ffn_hidden=512, layers=8)
    params = {p.name: p for p in iter_params(spec)}
    prefix = "model.layers.3."
    plain = initial_value(spec, params[prefix + "mlp.up_proj.weight"], 1)
    out = initial_value(spec, params[prefix + "mlp.down_proj.weight"], 1)
    assert float(plain.std()) == pytest.approx(0.02, rel=0.01)
    assert float(out.std()) == pytest.approx(0.02 / 4, rel=0.01)
    assert torch.equal(
        initial_value(spec, params[prefix + "input_layernorm.weight"], 1), torch.ones(256)
    )
    assert not initial_value(spec, params[prefix + "mlp.up_proj.bias"], 1).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "nonesuch"}, "'nonesuch' cannot be trained yet"),
        ({"norm": "layernorm"}, "says family 'llama' but is not one"),
        ({"rope": RopeSpec(1e4, (("rope_type", "yarn"),))}, "'yarn' cannot be trained yet"),
        ({"rope": RopeSpec(1e4, (("rope_type", "linear"),))}, "needs a positive 'factor'"),
    ],
)
def test_unsupported_architecture_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_supported(replace(spec_from_dict(TINY), **change))
