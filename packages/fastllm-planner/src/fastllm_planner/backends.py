"""Training stacks as priors (``backends.toml``): what they keep in memory, how fast they are."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from importlib.resources import files
from typing import Any

from fastllm_planner.errors import UserError


@dataclass(frozen=True)
class Backend:
    """One stack. Bytes are per parameter or per element, efficiencies are shares of a ceiling.

    Pipelines: ``zero23_with_pipeline``: shards stay gathered from the first to the last micro-batch
    (FSDP2 under torch's schedules); ``ends_as_layers``: embedding and head may count as a layer
    each when stages are filled (Megatron's account-for-embedding and -loss).

    States: ``weight_bytes``, ``grad_bytes`` and ``optimizer_bytes`` per parameter; the layout's
    ZeRO stage says which are divided. ``fp32_shard``: parameters live as fp32 shards and are cast
    when gathered (FSDP), so the gathered copy comes on top.

    Memory of activations: ``saved_per_hidden`` bytes x h per token for norm inputs and outputs,
    ``saved_mlp_extra`` bytes x MLP width, with ``saves_gathered`` also the gathered inputs of the
    first products under sequence parallelism (others gather them again), ``logits_bytes`` per logit
    at the loss, ``scores_bytes`` per attention score without flash attention (softmax 2, dropout 2
    and its mask 1), all but the loss times ``activation_multiplier``. ``stage_buffers``: copies of
    the stage input that the pipeline engine keeps per micro-batch in flight. ``live_params``:
    parameters that ZeRO-3 lets live at once, where it gathers parts of a layer (DeepSpeed's
    stage3_max_live_parameters); ``reduce_bucket``: gradients that its ZeRO-1 and 2 reduce at once,
    in two buffers, ZeRO-1 beside a copy of the rank's own part. ``optimizer_temp_bytes`` per
    updated parameter live only in the optimizer step. ``bf16_extra_grad_bytes`` per parameter:
    DeepSpeed's BF16_Optimizer keeps fp32 gradients beside the bf16 ones. ``second_engine``: what of
    these another engine of the stack has, which trains bf16 and fp32 with whole weights and
    gradients (ZeRO 0 and 1, without offload); its ``optimizer_bytes`` are those of bf16.
    ``context_gib``: CUDA context, NCCL and the fixed buffers; ``fragmentation``: share that
    the allocator caches unused.

    Time: ``gemm``: share of the device's measured matmul ceiling that a large GEMM of this stack
    reaches; ``pads_vocab``: to a multiple of 128 x TP; ``attention``: newest flash-attention
    generation it uses (``hardware/attention.toml``); ``*_bytes``: memory traffic per element of one
    norm, residual addition, rotary embedding and gated activation, forward (fused: read and write
    bf16 once; eager rmsnorm: 34 in fp32 steps); ``accumulate_bytes``: bytes moved per parameter and
    micro-batch to accumulate gradients; ``early_stop``: recomputation ends before the last
    projection, whose output nobody needs (torch's non-reentrant checkpoint); ``selective``: what
    selective recomputation repeats: "attention" (Megatron) or "half" of the matrix products and
    everything between them (torch's per-op policy); ``dp_calls``: collectives per layer and pass
    when states are gathered after the step, ``zero3_calls``: the same under ZeRO-3 (their ring
    latency grows with the ranks); ``collective_efficiency``: of tensor-parallel collectives,
    relative to a bare NCCL test; ``ring_loss``: attention that much slower on many context-parallel
    ranks (chunks, merging); overlaps: the share of the communication time that can hide behind
    compute.
    """

    name: str
    description: str
    # regular expression on a run's source and notes that tells this stack ("" for never), and one
    # that must not match; ``refines``: the stack that must have been told first
    detect: str = ""
    detect_not: str = ""
    refines: str = ""
    # stacks that share kernels and habits: what one teaches about speed holds partly for the others
    family: str = ""
    default_zero_stage: int = 1
    # what it can do
    max_zero_stage: int = 3
    tensor_parallel: bool = True
    pipeline_parallel: bool = True
    zero23_with_pipeline: bool = False
    interleaving: bool = True
    ends_as_layers: bool = False
    context_parallel: bool = True
    offload: bool = False
    # memory
    weight_bytes: float = 2.0
    grad_bytes: float = 4.0
    optimizer_bytes: float = 12.0
    fp32_shard: bool = False
    saved_per_hidden: float = 8.0
    saved_mlp_extra: float = 0.0
    saves_gathered: bool = False
    activation_multiplier: float = 1.0
    logits_bytes: float = 6.0
    scores_bytes: float = 5.0
    context_gib: float = 1.5
    fragmentation: float = 0.04
    stage_buffers: float = 0.0
    live_params: float = 0.0
    reduce_bucket: float = 0.0
    lazy_gradients: bool = False
    optimizer_temp_bytes: float = 0.0
    bf16_extra_grad_bytes: float = 0.0
    second_engine: Mapping[str, float] = field(default_factory=dict[str, float])
    # time
    gemm: float = 0.92
    pads_vocab: bool = False
    attention: str = "fa3"
    rmsnorm_bytes: float = 4.0
    layernorm_bytes: float = 4.0
    residual_bytes: float = 6.0
    rope_bytes: float = 4.0
    gate_bytes: float = 6.0
    accumulate_bytes: float = 4.0
    early_stop: bool = False
    selective: str = "attention"
    dp_calls: float = 1.0
    zero3_calls: float = 1.0
    memory_efficiency: float = 0.8
    tp_overlap: float = 0.0
    dp_overlap: float = 0.9
    pp_overlap: float = 0.5
    zero3_overlap: float = 0.9
    ep_overlap: float = 0.0
    ring_loss: float = 0.0
    grad_reduce_bytes: float = 4.0
    collective_efficiency: float = 1.0
    layer_overhead_us: float = 60.0
    # with experts: routing waits for the host. Megatron-Bridge's Qwen3-30B-A3B takes 8 to 9 ms a
    # layer (three passes) on H100 and B200 alike where a micro-batch has 4,096 tokens.
    moe_layer_overhead_us: float = 2200.0
    step_overhead_ms: float = 20.0

    def __hash__(self) -> int:
        """Equal backends have equal names; hashing every field costs more than a price does."""
        return hash(self.name)


@cache
def _tables() -> dict[str, Backend]:
    text = files("fastllm_planner").joinpath("backends.toml").read_text(encoding="utf-8")
    raw: dict[str, dict[str, Any]] = tomllib.loads(text)
    known = {f.name for f in fields(Backend)}
    found: dict[str, Backend] = {}
    merged: dict[str, dict[str, Any]] = {}
    for name, table in raw.items():
        values = {**merged.get(str(table.get("base", "")), {}), **table}
        values.pop("base", None)
        merged[name] = values
        unknown = set(values) - known
        assert not unknown, f"backends.toml: {name} has unknown keys {sorted(unknown)}"
        found[name] = Backend(name=name, **values)
    return found


def backend_names() -> list[str]:
    return list(_tables())


def backend(name: str) -> Backend:
    """A backend by name. ``UserError`` names the nearest known one."""
    found = _tables().get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), backend_names(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(backend_names())}"
        raise UserError(f"unknown backend {name!r}", hint=hint)
    return found


def detect_backend(
    text: str, sharding: str, *, flash: bool, zero_stage: int = 0
) -> tuple[Backend, bool]:
    """The stack behind a published run, and whether ``text`` named it.

    By its name, else by what it does: unfused attention means a Megatron of 2022 or before, FSDP
    words PyTorch's FSDP, the rest Megatron-LM. What a named stack cannot do, its nearest relative
    did: ZeRO-2 and 3 of a Megatron are DeepSpeed's. ``sharding``: the run's own words
    ("dist-opt(1)", "fsdp2(3)", "1").
    """
    found = next((b for b in _tables().values() if not b.refines and _tells(b, text)), None)
    named = found is not None
    if found is None:
        found = backend("megatron-lm" if flash else "megatron-2021")
        if flash and re.search("[fh]sdp", sharding, re.IGNORECASE):
            found = backend("fsdp")
    if found.family == "megatron" and not flash:
        found = backend("megatron-2021")
    if zero_stage > max(1, found.max_zero_stage):
        found = backend("megatron-fsdp" if named and flash else "deepspeed")
    if found.name == "deepspeed" and not flash:
        found = backend("megatron-deepspeed")
    for candidate in _tables().values():
        if candidate.refines == found.name and _tells(candidate, text):
            return candidate, named
    return found, named


def _tells(candidate: Backend, text: str) -> bool:
    """Whether a text names this stack."""
    if not candidate.detect or not re.search(candidate.detect, text, re.IGNORECASE):
        return False
    refused = candidate.detect_not
    return not (refused and re.search(refused, text, re.IGNORECASE))
