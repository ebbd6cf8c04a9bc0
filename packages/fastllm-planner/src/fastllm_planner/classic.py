"""The classic calculator: model size, memory, ZeRO strategy and days from closed formulas.

This is the arithmetic of the spreadsheet that teams used before they had a planner, kept because
its numbers are known. Everything is in units of 1e9 (parameters, elements, bytes). Sources: 12·h²
per layer and 8·N·tokens FLOPs with recompute, arXiv:2104.04473; 16 = 2+2+12 bytes per parameter and
the ZeRO stages, arXiv:1910.02054; 34·b·s·h bytes (and 5·a·s²·b for the scores) of activations per
layer, arXiv:2205.05198 table 2; the square root for gradient checkpointing, arXiv:1604.06174.

What it gets wrong is in ``LIMITS``; ``plan`` computes the same questions exactly.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

GIGA = 10**9
SECONDS_PER_DAY = 86_400
TRAIN_BYTES = 16  # 2 weights + 2 gradients + 12 Adam (fp32 master, two moments)
OFFLOAD_SLACK_GB = 3  # ZeRO-1 this close to the limit is offered with offload
MLP_BYTES = 19  # of the 34 activation bytes per element, those of the MLP (arXiv:2205.05198 §4.1)
LIMITS = (
    "counts h*h layers of GPT shape (no grouped-query attention, no SwiGLU width, one embedding)",
    "takes a square root for checkpointing that no engine implements, and no logits or buffers",
    "charges every GPU the whole batch, and time has no communication, bubble or attention term",
)

Outcome = Literal["not_enough", "zero1", "zero1_offload", "zero2", "zero1_tp", "zero1_tp_pp"]


@dataclass(frozen=True)
class ClassicInput:
    """``gpu_memory`` in GB per GPU, ``tokens`` in tokens, ``tflops`` achieved per GPU.

    ``heads``: add the score term of attention without FlashAttention. ``experts`` and
    ``active_experts``: every layer's MLP is repeated ``experts`` times behind a router.
    """

    hidden: int
    layers: int
    seq_len: int
    vocab: int
    nodes: int
    gpus_per_node: int
    gpu_memory: float
    batch_size: int
    tokens: float
    tflops: float
    gradient_checkpointing: bool = True
    heads: int | None = None
    experts: int = 1
    active_experts: int = 1

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Sizes:
    """Billions of parameters (``emb``, ``layer``, ``model``, ``active``) or elements (the rest)."""

    emb: float
    layer: float
    model: float
    active: float
    input: float
    activation: float
    activation_one: float


@dataclass(frozen=True)
class Strategy:
    """One recommended row: memory in GB per GPU, time in days."""

    name: str
    dp: int
    tp: int
    pp: int
    memory: float
    days: float


@dataclass(frozen=True)
class ClassicResult:
    """Everything the tables print; memory in GB, rounded to two decimals as printed."""

    inputs: ClassicInput
    sizes: Sizes
    usable: float
    total: float
    eval_total: float
    zero_eval: tuple[float, float, float]
    zero_train: tuple[float, float, float]
    days: float
    outcome: Outcome
    strategies: tuple[Strategy, ...]

    def to_json(self) -> dict[str, Any]:
        return {"schema": 1, **asdict(self), "fits": self.outcome != "not_enough"}


def zero_bytes(stage: int, ranks: float) -> float:
    """Bytes per parameter that one of ``ranks`` data-parallel ranks holds under a ZeRO stage."""
    if stage == 1:
        return 2 + 2 + 12 / ranks
    if stage == 2:
        return 2 + 14 / ranks
    return TRAIN_BYTES / ranks


def compute(inputs: ClassicInput) -> ClassicResult:
    """All figures and the recommendation."""
    sizes = _sizes(inputs)
    gpus = inputs.gpus
    working = 2 * (sizes.input + sizes.activation)
    usable = inputs.gpu_memory - 1
    flops = 8 * inputs.tokens * sizes.active * GIGA
    days = round(flops / (gpus * inputs.tflops * 1e12 * SECONDS_PER_DAY), 2)
    train = [round(sizes.model * zero_bytes(stage, gpus) + working, 2) for stage in (1, 2, 3)]
    total = round(TRAIN_BYTES * sizes.model + working, 2)
    outcome, strategies = _recommend(inputs, sizes.model, working, usable, total, train, days)
    return ClassicResult(
        inputs=inputs,
        sizes=sizes,
        usable=usable,
        total=total,
        eval_total=round(2 * sizes.model + working, 2),
        zero_eval=(
            round(2 * sizes.model, 2),
            round(2 * sizes.model, 2),
            round(2 * sizes.model / gpus, 2),
        ),
        zero_train=(train[0], train[1], train[2]),
        days=days,
        outcome=outcome,
        strategies=strategies,
    )


def _sizes(inputs: ClassicInput) -> Sizes:
    h, s, layers = inputs.hidden, inputs.seq_len, inputs.layers
    experts, active = inputs.experts, inputs.active_experts
    emb = (inputs.vocab * h + s * h) / GIGA
    router = experts * h if experts > 1 else 0

    def layer(copies: int) -> float:
        # 12·h² = 4·h² of attention + 8·h² of MLP; only the MLP is repeated.
        return (4 * h**2 + 8 * h**2 * copies + 6 * h + router) / GIGA

    def activation(batch: int) -> float:
        per_element = 34 + MLP_BYTES * (active - 1)
        elements = per_element * batch * s * h * layers
        if inputs.heads is not None:
            elements += 5 * inputs.heads * s**2 * batch * layers
        return math.sqrt(elements / GIGA) if inputs.gradient_checkpointing else elements / GIGA

    return Sizes(
        emb=emb,
        layer=layer(experts),
        model=layers * layer(experts) + emb + h / GIGA,
        active=layers * layer(active) + emb + h / GIGA,
        input=inputs.batch_size * s * h / GIGA,
        activation=activation(inputs.batch_size),
        activation_one=activation(1),
    )


def _recommend(
    inputs: ClassicInput,
    model: float,
    working: float,
    usable: float,
    total: float,
    train: list[float],
    days: float,
) -> tuple[Outcome, tuple[Strategy, ...]]:
    gpus, tp = inputs.gpus, inputs.gpus_per_node
    zero1, zero2, zero3 = train
    if total > usable * gpus:
        return "not_enough", ()
    if zero1 < usable:
        return "zero1", (Strategy("Zero1", gpus, 1, 1, zero1, days),)
    if zero1 - usable < OFFLOAD_SLACK_GB:
        return "zero1_offload", (Strategy("Zero1+offload", gpus, 1, 1, zero1, days),)
    if zero2 < usable:
        return "zero2", (Strategy("Zero2", gpus, 1, 1, zero2, days),)
    fallback = Strategy("Zero3+(offload)", gpus, 1, 1, zero3, days)
    node = tp * usable
    if total < node:
        dp = inputs.nodes
        memory = round(model * zero_bytes(1, dp) / tp + working / tp, 2)
        return "zero1_tp", (Strategy("Zero1+TP", dp, tp, 1, memory, days), fallback)
    pp = math.ceil(total / node)
    dp = max(1, int(gpus / tp / pp))
    if dp == 1:
        pp = gpus // tp
    memory = round(model * zero_bytes(1, dp) / pp / tp + working / tp, 2)
    return "zero1_tp_pp", (Strategy("Zero1+TP+PP", dp, tp, pp, memory, days), fallback)
