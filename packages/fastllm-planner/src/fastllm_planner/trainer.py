"""What this version of fastllm-train can run, so that a plan for it says so.

The planner does not import the trainer: ``tests/contracts/test_emitted_configs.py`` holds these
rules against it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastllm_planner.arch import ArchSpec
from fastllm_planner.layout import Layout
from fastllm_planner.plan import Job, Plan
from fastllm_planner.plan_text import duration, strategy_words
from fastllm_planner.search import search

BACKEND = "fastllm"
# Axes of the search that the trainer runs at one size only.
TRAINER_SIZES = {"virtual_stages": 1}
CANDIDATES = 50  # of a search, among which a layout for the trainer is looked for
TRAINER_DTYPES = ("bf16", "fp32")
TRAINER_FAMILIES = tuple("llama mistral qwen2 qwen3 gpt2 baichuan mixtral qwen3_moe".split())


def trainer_pins(spec: ArchSpec) -> dict[str, Any]:
    """The pins of a search for what the trainer runs."""
    del spec  # every family runs the same axes
    return dict(TRAINER_SIZES)


def job_reasons(job: Job) -> list[str]:
    """Why the trainer runs no layout of this job, a clause each; empty if it can."""
    reasons: list[str] = []
    if job.spec.family not in TRAINER_FAMILIES:
        reasons.append(f"has no {job.spec.family} models yet")
    if job.dtype not in TRAINER_DTYPES:
        reasons.append(f"runs bf16 and fp32, not {job.dtype}")
    if job.seq_len > job.spec.max_seq_len:
        reasons.append(
            f"takes no sequences of {job.seq_len} tokens: the model has {job.spec.max_seq_len} "
            "positions"
        )
    return reasons


def layout_reasons(spec: ArchSpec, layout: Layout) -> list[str]:
    """What of a layout the trainer cannot run yet (``pp=4``); empty if it runs all of it."""
    lacking = [
        f"{axis}={getattr(layout, axis)}"
        for axis, size in trainer_pins(spec).items()
        if getattr(layout, axis) != size
    ]
    if layout.ep > 1 and (layout.zero_stage == 3 or layout.dp % layout.ep):
        # experts are shared out among replicas, with ZeRO 1 or 2
        lacking.append(f"ep={layout.ep}")
    kv_heads = max(1, spec.kv_heads // layout.tp)
    kv_divide = kv_heads % layout.cp == 0 or layout.cp % kv_heads == 0
    if (spec.heads // layout.tp) % layout.cp or not kv_divide:
        lacking.append(f"cp={layout.cp}")  # attention exchanges positions for heads
    return lacking


def trainer_words(plan: Plan, pins: Mapping[str, Any]) -> str:
    """What of a plan the trainer cannot run, and the best it can ("" if it runs the plan).

    ``pins``: what the user fixed. For other backends the trainer has nothing to say.
    """
    job = plan.job
    if job.backend.name != BACKEND:
        return ""
    against = job_reasons(job)
    if against:
        return f"fastllm-train cannot run it: it {against[0]}."
    lacking = layout_reasons(job.spec, plan.layout)
    if not lacking:
        return ""
    sentence = f"fastllm-train cannot run {', '.join(lacking)} yet"
    found = search(job, top_k=CANDIDATES, pinned={**pins, **trainer_pins(job.spec)}).ranked
    ranked = [other for other in found if not layout_reasons(job.spec, other.layout)]
    if not ranked:
        return f"{sentence}, and nothing that it can run fits."
    best = ranked[0]
    return (
        f"{sentence}; the best it can run: {strategy_words(best.layout)}, "
        f"{duration(best.seconds)} a step."
    )
