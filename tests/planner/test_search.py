"""The search is exact: against brute force over the same space, and on the facts it rests on."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm_planner.backends import backend_names
from fastllm_planner.hardware import GIB
from fastllm_planner.layout import Layout
from fastllm_planner.memory import estimate_memory, peak_bytes
from fastllm_planner.plan import Job
from fastllm_planner.search import TIE, divisors, search, shapes, simplicity, strategy
from fastllm_planner.steptime import step_seconds

from .jobs import job

Key = tuple[Any, ...]


def brute_force(question: Job) -> dict[Key, dict[Key, tuple[float, Layout]]]:
    """Fastest fitting layout of every variant of every strategy, by pricing the whole space."""
    best: dict[Key, dict[Key, tuple[float, Layout]]] = {}
    for shape in shapes(question, {}):
        for micro in range(1, question.global_batch // shape.dp + 1):
            if question.global_batch % (shape.dp * micro):
                continue
            for recompute in ("none", "selective", "full"):
                for sequence in (False, True):
                    layout = replace(
                        shape,
                        micro_batch=micro,
                        recompute=recompute,
                        sequence_parallel=sequence,
                    )
                    if question.reasons_against(layout):
                        continue
                    args = (question.spec, layout, question.cluster, question.backend)
                    memory = estimate_memory(*args)
                    if memory.required > question.usable_bytes or not memory.fits(question.cluster):
                        continue
                    of_one = best.setdefault(strategy(layout), {})
                    variant = (layout.zero_stage, layout.offload, recompute, sequence)
                    seconds = step_seconds(*args)
                    if variant not in of_one or seconds < of_one[variant][0]:
                        of_one[variant] = (seconds, layout)
    return best


def simplest_tie(of_one: dict[Key, tuple[float, Layout]]) -> tuple[float, Layout]:
    """The plainest of the variants within ``TIE`` of the fastest."""
    limit = min(seconds for seconds, _ in of_one.values()) * (1 + TIE)
    near = [entry for entry in of_one.values() if entry[0] <= limit]
    return min(near, key=lambda entry: simplicity(entry[1]))


QUESTIONS = {
    "one_gpu": job("llama-3.2-1b", "A100-80G", 1, "fastllm"),
    "eight_with_zero3": job("llama-2-13b", "A100-80G", 8, "fastllm"),
    "offload_needed": job("llama-2-13b", "A100-40G", 4, "fastllm"),
    "offload_too_large_for_the_host": job("llama-2-13b", "A100-40G", 4, "fastllm", host=300 * GIB),
    "one_gpu_offloads_parameters": job("llama-3-8b", "RTX-4090", 1, "fastllm", host=300 * GIB),
    "pipelines": job("llama-2-13b", "A100-80G", 16, "megatron-fused", per_node=4),
    "interleaved_and_context": job(
        "llama-2-7b", "H100-SXM", 16, "megatron-fused", seq_len=4096, per_node=8
    ),
    "scores_kept": job("gpt3-13b", "A100-80G", 16, "megatron-deepspeed", flash=False),
    "experts": job("mixtral-8x7b", "H200", 16, "megatron-fused"),
    "six_gpus": job("llama-3-8b", "A100-80G", 6, "fastllm", global_batch=24),
    "fsdp": job("llama-3-8b", "A100-80G", 8, "fsdp"),
    "nothing_fits": job("llama-2-70b", "RTX-4090", 2, "megatron-fused"),
}


def gainful(
    best: dict[Key, dict[Key, tuple[float, Layout]]],
) -> dict[Key, dict[Key, tuple[float, Layout]]]:
    """The strategies without those that offload and gain no more than ``TIE`` by it."""
    times = {key: simplest_tie(of_one)[0] for key, of_one in best.items()}
    return {
        key: of_one
        for key, of_one in best.items()
        if not key[-1] or times.get((*key[:-1], False), float("inf")) > times[key] * (1 + TIE)
    }


@pytest.mark.parametrize("question", QUESTIONS.values(), ids=QUESTIONS)
def test_agrees_with_brute_force(question: Job) -> None:
    expected = gainful(brute_force(question))
    fastest = {key: min(s for s, _ in of_one.values()) for key, of_one in expected.items()}
    for top_k in (1, 4, 1000):
        ranked = search(question, top_k=top_k).ranked
        assert len(ranked) == min(top_k, len(expected))
        if not ranked:
            continue
        assert len({strategy(candidate.layout) for candidate in ranked}) == len(ranked)
        assert ranked[0].seconds <= min(fastest.values()) * (1 + TIE) ** 2
        # Which strategies are listed: the fastest, and perhaps a simpler tie in place of the last.
        kept = sorted(fastest[strategy(candidate.layout)] for candidate in ranked)
        limit = max(sorted(fastest.values())[len(ranked) - 1], min(fastest.values()) * (1 + TIE))
        assert kept[-1] <= limit
        assert [c.seconds for c in ranked[1:]] == sorted(c.seconds for c in ranked[1:])
        for candidate in ranked:
            seconds, layout = simplest_tie(expected[strategy(candidate.layout)])
            assert candidate.seconds == seconds
            assert simplicity(candidate.layout) == simplicity(layout)
            assert candidate.peak <= question.usable_bytes
            assert question.reasons_against(candidate.layout) == []


def test_offload_is_listed_only_where_it_gains_something() -> None:
    """Near-duplicates of a layout, with its states on the host, do not fill the list."""
    ranked = search(job("llama-2-70b", "H100-SXM", 64, "fastllm"), top_k=5).ranked
    times = {strategy(c.layout): c.seconds for c in ranked}
    assert len(times) == 5
    assert ranked[0].layout.offload == "none"
    for (*sizes, offloads), seconds in times.items():
        if offloads and (*sizes, False) in times:
            assert times[(*sizes, False)] > seconds * (1 + TIE)


def test_nothing_fits_names_the_leanest() -> None:
    question = QUESTIONS["nothing_fits"]
    result = search(question)
    assert result.ranked == []
    assert result.closest is not None
    assert result.closest.peak > question.cluster.gpu.memory_bytes
    assert any("memory" in reason for reason in result.rejections)


def test_every_shape_is_listed_rejected_or_slower() -> None:
    question = QUESTIONS["interleaved_and_context"]
    result = search(question, top_k=3)
    runnable = [s for s in shapes(question, {}) if not question.reasons_against(s)]
    too_large = [r.count for k, r in result.rejections.items() if "device memory" in k]
    not_runnable = sum(
        r.count
        for k, r in result.rejections.items()
        if "device memory" not in k and "no faster" not in k
    )
    assert not_runnable == result.shapes - len(runnable)
    slower = [r.count for k, r in result.rejections.items() if "no faster" in k]
    strategies = {strategy(shape) for shape in runnable}
    assert len(strategies) <= 3 + sum(slower) + sum(too_large)


def test_pins_are_kept() -> None:
    pinned = {"tp": 2, "pp": 2, "zero_stage": 1, "micro_batch": 1, "recompute": "full"}
    found = search(QUESTIONS["pipelines"], pinned=pinned).ranked
    assert found
    for candidate in found:
        for name, value in pinned.items():
            assert getattr(candidate.layout, name) == value


@pytest.mark.parametrize("stack", ["megatron-fused", "fastllm"])
def test_llama_70b_on_1024_gpus_prices_few_layouts(stack: str) -> None:
    """The bounds prune: ``benchmarks/planner/bench_search.py`` measures what that takes."""
    question = job("llama-2-70b", "H100-SXM", 1024, stack, global_batch=1024, seq_len=4096)
    result = search(question)
    assert result.ranked
    assert 0 < result.priced < 5_000


MODELS = (
    ("llama-2-7b", "A100-80G"),
    ("mixtral-8x7b", "H100-SXM"),
    ("gpt3-6.7b", "A100-40G"),
    ("deepseek-v3", "H800-SXM"),
)


@functools.cache
def runnable(model: str, device: str, stack: str, flash: bool) -> tuple[Job, list[Layout]]:
    question = job(model, device, 64, stack, global_batch=512, flash=flash)
    return question, [s for s in shapes(question, {}) if not question.reasons_against(s)]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[Job, Layout]:
    model, device = draw(st.sampled_from(MODELS))
    stack = draw(st.sampled_from(backend_names()))
    question, candidates = runnable(model, device, stack, draw(st.booleans()))
    shape = draw(st.sampled_from(candidates))
    micro = draw(st.sampled_from([1, 2, 4]))
    sequence = draw(st.booleans()) and shape.tp > 1
    layout = replace(shape, micro_batch=micro, sequence_parallel=sequence)
    return question, layout


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_recomputation_never_speeds_a_step_up(pair: tuple[Job, Layout]) -> None:
    question, layout = pair
    times = [
        step_seconds(
            question.spec, replace(layout, recompute=kind), question.cluster, question.backend
        )
        for kind in ("none", "selective", "full")
    ]
    assert times[0] <= times[1] * (1 + 1e-12)
    assert times[0] <= times[2] * (1 + 1e-12)


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_memory_grows_with_the_micro_batch_and_not_with_sequence_parallelism(
    pair: tuple[Job, Layout],
) -> None:
    question, layout = pair

    def peak(**changes: Any) -> float:
        changed = replace(layout, **changes)
        return peak_bytes(question.spec, changed, question.cluster, question.backend)

    doubled = replace(layout, micro_batch=2 * layout.micro_batch)
    saves_gradients = question.backend.lazy_gradients and doubled.micro_batches == 1
    for kind in ("none", "full"):
        if not saves_gradients:  # search asks about this case by itself
            assert peak(recompute=kind) <= peak(recompute=kind, micro_batch=doubled.micro_batch)
        if layout.tp > 1:
            with_sp = peak(recompute=kind, sequence_parallel=True)
            assert with_sp <= peak(recompute=kind, sequence_parallel=False)


@settings(max_examples=150, deadline=None)
@given(layouts())
def test_the_quick_peak_is_the_fullest_stage(pair: tuple[Job, Layout]) -> None:
    question, layout = pair
    args = (question.spec, layout, question.cluster, question.backend)
    assert peak_bytes(*args) == pytest.approx(estimate_memory(*args).required)


def test_divisors() -> None:
    assert divisors(1) == (1,)
    assert divisors(36) == (1, 2, 3, 4, 6, 9, 12, 18, 36)
    assert divisors(1024) == tuple(2**i for i in range(11))
