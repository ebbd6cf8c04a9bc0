"""[speed]: settings change how the arithmetic is run, never what comes out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import accumulation_worker
import compile_worker
import pytest
import torch
from rank_job import run_ranks
from train_layouts import TINY, tiny_config

from fastllm_planner.arch import MoeSpec, spec_from_dict
from fastllm_train.deepspeed_config import effective_zero_stage
from fastllm_train.distributed import runtime_line
from fastllm_train.errors import UserError
from fastllm_train.launch import COMPACT, worker_environment
from fastllm_train.models.decoder import Decoder, TrainingModel
from fastllm_train.models.initialise import initialise
from fastllm_train.models.kernels import FUSED, TORCH, Kernels
from fastllm_train.refusals import refuse
from fastllm_train.trace.tracer import MemoryTracer

VARIANTS = {
    "llama": {},
    "gpt2": {
        "family": "gpt2",
        "kv_heads": 4,
        "mlp": "gelu",
        "norm": "layernorm",
        "position": "learned",
        "mlp_bias": True,
        "tied_embeddings": True,
    },
    "mixtral": {"family": "mixtral", "moe": MoeSpec(4, 2, 48), "ffn_hidden": 48},
    "baichuan": {"family": "baichuan", "kv_heads": 4, "norm_head": True, "position": "alibi"},
}


def gradients(
    variant: str, kernels: Kernels, dtype: torch.dtype, *, recompute_elementwise: bool
) -> tuple[list[torch.Tensor], int]:
    """Loss and gradients, and the bytes that the forward pass leaves for the backward pass."""
    spec = replace(spec_from_dict(TINY), **VARIANTS[variant])
    model = TrainingModel(
        Decoder(spec, kernels=kernels, recompute_elementwise=recompute_elementwise)
    )
    initialise(model, spec, 0)
    model.to(dtype)
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(spec.vocab, (2, 48), generator=generator)
    positions = torch.arange(48).expand(2, -1)
    tracer = MemoryTracer()
    with tracer:
        hidden = model.model(tokens, positions)
    kept = tracer.current
    loss, _ = model.head_loss(hidden, tokens.roll(-1, 1), torch.ones(2, 48))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *found], kept


@pytest.mark.parametrize("kernels", [TORCH, FUSED], ids=["torch", "fused"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_elementwise_results_made_again_are_the_same_bits(variant: str, kernels: Kernels) -> None:
    kept, more = gradients(variant, kernels, torch.float32, recompute_elementwise=False)
    again, less = gradients(variant, kernels, torch.float32, recompute_elementwise=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert less < 0.9 * more


@pytest.mark.parametrize("variant", ["llama", "gpt2", "baichuan"])
def test_fused_loss_and_gradients_equal_the_reference_in_fp64(variant: str) -> None:
    """The head's loss in pieces, NormHead and tied embeddings included."""
    want, _ = gradients(variant, TORCH, torch.float64, recompute_elementwise=False)
    got, _ = gradients(variant, FUSED, torch.float32, recompute_elementwise=True)
    assert abs(got[0].double() - want[0]) <= 1e-6 * want[0]
    for a, b in zip(got[1:], want[1:], strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm()


def test_small_probabilities_do_not_underflow_in_fp16() -> None:
    """The loss scale is in the gradient of the logits before it is rounded to fp16."""
    hidden = torch.ones(1, 1, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[0.0], [-18.0]], dtype=torch.float16, requires_grad=True)
    loss = FUSED.head_loss(hidden, weight, torch.tensor([0]), torch.ones(1))
    (loss * 65536).backward()
    assert weight.grad is not None
    wanted = 65536 * torch.exp(torch.tensor(-18.0)).item()  # exp(-18) alone is below fp16's range
    assert weight.grad[1].item() == pytest.approx(wanted, rel=1e-3)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo looks
@pytest.mark.parametrize("variant", ["llama", "baichuan"])
@pytest.mark.parametrize("kernels", [TORCH, FUSED], ids=["torch", "fused"])
def test_compiled_layers_are_one_graph_and_give_the_same(variant: str, kernels: Kernels) -> None:
    spec = replace(spec_from_dict(TINY), **VARIANTS[variant])
    model = TrainingModel(Decoder(spec, kernels=kernels, recompute_elementwise=True))
    initialise(model, spec, 0)
    tokens = torch.randint(spec.vocab, (2, 48), generator=torch.Generator().manual_seed(7))
    batch = (tokens, torch.arange(48).expand(2, -1), tokens.roll(-1, 1), torch.ones(2, 48))
    results: list[list[torch.Tensor]] = []
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for compiled in (False, True):
        if compiled:  # (aot_eager: the graphs are what is tested, not what inductor makes of them)
            model.model.compile_layers(backend="aot_eager")
        model.zero_grad()  # to None: the gradients of the first run stay as they are
        loss = model(*batch)
        loss.objective.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        results.append([loss.cross_entropy, *grads])
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] >= 1
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compiled_layers_take_their_collectives_along(tmp_path: Path) -> None:
    """Under tensor and sequence parallelism, on two ranks; one graph a layer, and through inductor,
    too."""
    out = tmp_path / "errors.json"
    run_ranks([compile_worker.__file__, str(out)], 2)
    found = json.loads(out.read_text())
    assert found.keys() == compile_worker.RUNS.keys()
    for name, run in found.items():
        assert run["graphs"] >= 1, name
        assert run["breaks"] == 0, name
        assert run["error"] <= 1e-5, name


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ({"parallel": {"zero_stage": 3}}, "ZeRO-3"),
        ({"parallel": {"cp": 2}}, "context parallelism"),
    ],
)
def test_compile_is_refused(section: dict[str, Any], why: str) -> None:
    config = tiny_config(speed={"compile": True}, **section)
    with pytest.raises(UserError, match=why):
        refuse(config, config.model.resolve())


def test_worker_environment_sets_the_allocator_and_keeps_the_users() -> None:
    fast = worker_environment({}, 0, 1, 1)
    assert fast["THP_MEM_ALLOC_ENABLE"] == "1"
    assert "GLIBC_TUNABLES" not in fast
    compact = worker_environment({}, 0, 1, 1, "compact")
    assert compact["GLIBC_TUNABLES"] == COMPACT
    mine = {"GLIBC_TUNABLES": "glibc.malloc.check=1", "THP_MEM_ALLOC_ENABLE": "0"}
    kept = worker_environment(mine, 0, 1, 1, "compact")
    assert {key: kept[key] for key in mine} == mine
    line = runtime_line(compact, 2)
    assert line == f"2 threads a process; huge pages for tensors: on; malloc: {COMPACT}"
    assert "huge pages for tensors: off" in runtime_line({}, 2)


def test_gradients_are_added_up_in_fp32(tmp_path: Path) -> None:
    """Against fp32 sums of the same bf16 gradients; adding in bf16 is the negative control."""
    out = tmp_path / "errors.json"
    run_ranks([accumulation_worker.__file__, str(out)], 2)
    errors = json.loads(out.read_text())
    assert errors.keys() == accumulation_worker.SETTINGS.keys()
    for name, error in errors.items():
        if name.startswith("fp32"):
            assert error < 1e-3, errors
        else:
            assert error > 3e-3, errors
    stage, why = effective_zero_stage(accumulation_worker.config_of("fp32", 1))
    assert (stage, bool(why)) == (2, True)
