"""The fastest layouts that fit, found exactly: best first, with bounds, nothing sampled.

The space is ZeRO stage × DP × TP × PP × virtual stages × CP × EP × micro-batch × recomputation ×
sequence parallelism × offload. A *strategy* is its DP, TP, PP and CP, and whether it offloads:
layouts that differ only in their ZeRO stage are near-duplicates, so the answer holds one layout of
each of the ``top_k`` fastest strategies, the one with the least machinery of those within ``TIE``
of its best; an offloaded one only if it gains more than that over the same sizes without. A *shape*
is a strategy with ZeRO stage, offload, virtual stages and EP, but no micro-batch, recomputation or
sequence parallelism yet. The simplest strategy within ``TIE`` of the fastest is put first.

Three facts about the cost model keep it exact and quick (``tests/planner/test_search.py`` holds
them against brute force and random layouts):

1. memory does not fall with the micro-batch (but where one micro-batch is the whole step, stacks
   with lazy gradients save them), and sequence parallelism does not raise it, so a shape that is
   too large there in its leanest variants is out as a whole;
2. recomputation never makes a step faster, so a layout's time without it bounds its variants;
3. candidates leave a heap in order of that bound, so the first that fit are the fastest, and
   memory is computed only for those.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, get_args

from fastllm_planner.hardware import GIB
from fastllm_planner.layout import Layout, Offload, Recompute, pipeline_slots
from fastllm_planner.memory import peak_bytes
from fastllm_planner.offload import host_and_nvme_bytes
from fastllm_planner.plan import Job
from fastllm_planner.steptime import step_seconds

MIN_TOKENS_PER_CP_RANK = 4096  # where sequences are short, context parallelism is data parallelism
MAX_MICRO_BATCH = 64
# Of layouts this close in time the simplest is recommended: no prediction is exact to 2 %
# (the same published configuration moves 1-7 % between software releases).
TIE = 0.02
# Axes that a caller may fix, and the values that are not sizes.
PINNABLE: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("dp", "tp", "pp", "virtual_stages", "cp", "ep", "micro_batch"), ()),
    "zero_stage": (0, 1, 2, 3),
    "recompute": get_args(Recompute),
    "sequence_parallel": (True, False),
    "offload": get_args(Offload),
}


@dataclass(frozen=True)
class Candidate:
    """A layout that fits: seconds of its step, bytes that its fullest rank needs."""

    layout: Layout
    seconds: float
    peak: float


@dataclass(frozen=True)
class Closest:
    """The layout that lacks least. Bytes. ``lacking``: how many kinds of memory, and
    the largest share of what there is that is needed.
    """

    layout: Layout
    peak: float
    host: float
    nvme: float
    lacking: tuple[int, float]


@dataclass
class Rejection:
    """Layouts that share a reason; ``example`` is one of them, ``detail`` its own sentence."""

    reason: str
    count: int
    example: Layout
    detail: str


@dataclass
class SearchResult:
    """``ranked`` by time. ``shapes`` were considered; ``priced`` layouts got a step time.

    ``closest``: the layout that comes nearest to fitting.
    """

    ranked: list[Candidate] = field(default_factory=list[Candidate])
    rejections: dict[str, Rejection] = field(default_factory=dict[str, Rejection])
    shapes: int = 0
    priced: int = 0
    closest: Closest | None = None

    def reject(self, layout: Layout, reason: str, detail: str) -> None:
        entry = self.rejections.setdefault(reason, Rejection(reason, 0, layout, detail))
        entry.count += 1


@lru_cache(maxsize=1024)
def divisors(number: int) -> tuple[int, ...]:
    """Divisors in ascending order."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def search(job: Job, *, top_k: int = 5, pinned: Mapping[str, Any] | None = None) -> SearchResult:
    """The best layout of each of the ``top_k`` fastest strategies. ``pinned`` fixes axes.

    Raises ``KeyError`` for a pin that is no axis.
    """
    pins = dict(pinned or {})
    if unknown := set(pins) - set(PINNABLE):
        raise KeyError(f"no axis of the search: {', '.join(sorted(unknown))}")
    result = SearchResult()
    heap: list[_Entry] = []
    for shape in _runnable_shapes(job, pins, result):
        if _can_fit(job, shape, pins, result):
            for layout in _micro_variants(job, shape, pins):
                _push(heap, job, layout, result)
    # Each layout without offload displaces at most its offloaded twin.
    wanted = 2 * top_k if job.backend.offload else top_k
    found, slower = _take_best(heap, job, wanted, pins, result)
    found = _without_vain_offload(found)
    if not found:
        return result
    found.sort(key=lambda candidate: candidate.seconds)
    simplest = _simplest(found)
    found.remove(simplest)
    result.ranked = [simplest, *found][:top_k]
    listed = {strategy(candidate.layout) for candidate in result.ranked}
    slower |= {strategy(layout): layout for _, _, _, layout in heap}
    slower |= {strategy(candidate.layout): candidate.layout for candidate in found}
    examples = [layout for key, layout in slower.items() if key not in listed]
    if examples:
        reason = f"strategies no faster than the {len(listed)} listed"
        detail = "its step is no shorter than theirs"
        result.rejections[reason] = Rejection(reason, len(examples), examples[0], detail)
    return result


_Entry = tuple[float, tuple[int, ...], int, Layout]


def _take_best(
    heap: list[_Entry], job: Job, wanted: int, pins: Mapping[str, Any], result: SearchResult
) -> tuple[list[Candidate], dict[tuple[Any, ...], Layout]]:
    """Pop in order of time: the simplest of the best of ``wanted`` strategies, and of all that tie
    with the fastest; and strategies that were passed over because they are slower."""
    found: dict[tuple[Any, ...], dict[tuple[Any, ...], Candidate]] = {}
    passed: dict[tuple[Any, ...], Layout] = {}
    ties = limit = float("inf")
    allowed = pins.get("recompute")
    while heap and heap[0][0] <= limit:
        seconds, _, _, layout = heapq.heappop(heap)
        key = strategy(layout)
        variants = found.get(key, {})
        if not variants and len(found) >= wanted and seconds > ties and _twin(key) not in found:
            passed[key] = layout
            continue
        if _variant(layout) in variants or (variants and seconds > _tied(variants.values())):
            continue
        peak = peak_bytes(job.spec, layout, job.cluster, job.backend)
        if peak <= job.usable_bytes and allowed in (None, layout.recompute):
            found.setdefault(key, {})[_variant(layout)] = Candidate(layout, seconds, peak)
            ties = min(ties, seconds * (1 + TIE))
            if len(found) >= wanted:
                # the slowest strategy of the list may still have a simpler variant
                limit = max(_tied(of_one.values()) for of_one in found.values())
        elif layout.recompute == "none":
            for recompute in _recomputes(job):
                if recompute != "none" and allowed in (None, recompute):
                    _push(heap, job, replace(layout, recompute=recompute), result)
    return [_simplest(of_one.values()) for of_one in found.values()], passed


def _without_vain_offload(found: list[Candidate]) -> list[Candidate]:
    """All but those whose sizes are as fast without offload."""
    plain = {strategy(c.layout): c.seconds for c in found if c.layout.offload == "none"}
    return [
        c
        for c in found
        if c.layout.offload == "none"
        or plain.get(_twin(strategy(c.layout)), float("inf")) > c.seconds * (1 + TIE)
    ]


def _tied(candidates: Iterable[Candidate]) -> float:
    """The longest time that counts as no slower than the fastest of the candidates."""
    return min(candidate.seconds for candidate in candidates) * (1 + TIE)


def _simplest(candidates: Collection[Candidate]) -> Candidate:
    """The least machinery among those that tie with the fastest."""
    limit = _tied(candidates)
    near = [candidate for candidate in candidates if candidate.seconds <= limit]
    return min(near, key=lambda candidate: simplicity(candidate.layout))


def _push(heap: list[_Entry], job: Job, layout: Layout, result: SearchResult) -> None:
    seconds = step_seconds(job.spec, layout, job.cluster, job.backend, job.profile)
    result.priced += 1
    heapq.heappush(heap, (seconds, simplicity(layout), result.priced, layout))


def simplicity(layout: Layout) -> tuple[int, ...]:
    """Orders by machinery: of two layouts with the same time the plainer one comes first."""
    offload = ("none", "optimizer", "optimizer+params").index(layout.offload)
    recompute = ("none", "selective", "full").index(layout.recompute)
    # ZeRO-1 costs nothing over 0; 2 and 3 shard more and hold the network more.
    zero = (1, 0, 2, 3)[layout.zero_stage]
    sizes = (layout.cp, layout.pp * layout.tp, layout.virtual_stages, layout.pp, layout.ep)
    return (offload, *sizes, zero, recompute, layout.sequence_parallel, layout.micro_batch)


def strategy(layout: Layout) -> tuple[Any, ...]:
    """What distinguishes one listed layout from the next."""
    return (layout.dp, layout.tp, layout.pp, layout.cp, layout.offload != "none")


def _twin(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """The strategy of the same sizes that offloads, or does not."""
    return (*key[:-1], not key[-1])


def _variant(layout: Layout) -> tuple[Any, ...]:
    """What distinguishes the layouts of a strategy that compete for its line."""
    return (layout.zero_stage, layout.offload, layout.recompute, layout.sequence_parallel)


def _recomputes(job: Job) -> tuple[Recompute, ...]:
    # FlashAttention keeps no scores: selective recomputation would cost time and free nothing.
    return ("none", "full") if job.flash else ("none", "selective", "full")


def _runnable_shapes(job: Job, pins: Mapping[str, Any], result: SearchResult) -> Iterator[Layout]:
    for shape in shapes(job, pins):
        result.shapes += 1
        reasons = job.reasons_against(shape)
        if not reasons:
            yield shape
        for reason in reasons[:1]:
            result.reject(shape, _general(reason), reason)


def _general(reason: str) -> str:
    """The rule behind a sentence: its numbers replaced, so that layouts group."""
    return re.sub(r"\d+", "N", reason)


def shapes(job: Job, pins: Mapping[str, Any]) -> Iterator[Layout]:
    """Every shape of the space, at micro-batch 1, runnable or not."""
    world = job.cluster.n_gpus
    backend, spec = job.backend, job.spec
    model_parallel = min(world, max(job.cluster.gpus_per_node, spec.heads))
    for tp in _axis(pins, "tp", [d for d in divisors(world) if d <= model_parallel]):
        rest = world // tp
        for pp in _axis(pins, "pp", [d for d in divisors(rest) if d <= spec.layers]):
            for cp in _axis(pins, "cp", _context_sizes(job, rest // pp)):
                dp = rest // pp // cp
                if dp < 1 or pins.get("dp", dp) != dp:
                    continue
                base = Layout(
                    dp=dp,
                    tp=tp,
                    pp=pp,
                    cp=cp,
                    global_batch=job.global_batch,
                    seq_len=job.seq_len,
                    dtype=job.dtype,  # pyright: ignore[reportArgumentType]
                    flash=job.flash,
                    sequence_parallel=bool(pins.get("sequence_parallel", False)),
                    micro_batch=int(pins.get("micro_batch", 1)),
                )
                slots = pipeline_slots(spec, backend, pp)
                splits = backend.interleaving and pp > 1 and slots % pp == 0
                chunks = divisors(slots // pp) if splits else (1,)
                for virtual in _axis(pins, "virtual_stages", chunks):
                    yield from _state_shapes(job, replace(base, virtual_stages=virtual), pins)


def _state_shapes(job: Job, base: Layout, pins: Mapping[str, Any]) -> Iterator[Layout]:
    """ZeRO, expert parallelism and offload for one set of model-parallel sizes."""
    ranks = base.dp * base.cp
    experts = [1]
    if job.spec.moe is not None:
        experts = [d for d in divisors(ranks) if job.spec.moe.experts % d == 0]
    # With nobody to shard over the stages are the same; ZeRO-3 still offloads parameters.
    stages = [z for z in range(job.backend.max_zero_stage + 1) if ranks > 1 or z in (1, 3)]
    for ep in _axis(pins, "ep", experts):
        for zero in _axis(pins, "zero_stage", stages):
            for offload in _axis(pins, "offload", _offloads(job, base, zero)):
                yield replace(base, ep=ep, zero_stage=zero, offload=offload)


def _offloads(job: Job, base: Layout, zero: int) -> tuple[Offload, ...]:
    on_host = job.cluster.gpu.architecture == "cpu"
    if not job.backend.offload or on_host or base.pp > 1 or zero == 0:
        return ("none",) if zero < 3 or base.dp * base.cp > 1 else ()
    if zero < 3:
        return ("none", "optimizer")
    if base.dp * base.cp == 1:
        return ("optimizer+params",)
    return ("none", "optimizer", "optimizer+params")


def _context_sizes(job: Job, ranks: int) -> list[int]:
    if not job.backend.context_parallel:
        return [1]
    longest = max(1, job.seq_len // MIN_TOKENS_PER_CP_RANK)
    return [d for d in divisors(ranks) if d <= longest]


def _axis(pins: Mapping[str, Any], name: str, values: Any) -> Any:
    return (pins[name],) if name in pins else values


def _micro_variants(job: Job, shape: Layout, pins: Mapping[str, Any]) -> Iterator[Layout]:
    """Micro-batch sizes and sequence parallelism of one shape, without recomputation."""
    per_replica = job.global_batch // shape.dp
    sizes = [d for d in divisors(per_replica) if d <= MAX_MICRO_BATCH]
    for micro in _axis(pins, "micro_batch", sizes):
        for sequence in _axis(
            pins, "sequence_parallel", (False, True) if shape.tp > 1 else (False,)
        ):
            layout = replace(shape, micro_batch=micro, sequence_parallel=sequence)
            if layout == shape or not job.reasons_against(layout):
                yield layout


def _can_fit(job: Job, shape: Layout, pins: Mapping[str, Any], result: SearchResult) -> bool:
    """Whether the leanest variant of a shape fits; otherwise says what it lacks."""
    sequence = bool(pins.get("sequence_parallel", shape.tp > 1))
    lean = replace(shape, sequence_parallel=sequence)
    if job.reasons_against(lean):
        lean = shape
    kinds = (pins["recompute"],) if "recompute" in pins else _recomputes(job)
    sizes = {lean.micro_batch, lean.micro_batch if "micro_batch" in pins else _one_pass(job, lean)}
    variants = [replace(lean, micro_batch=m, recompute=kind) for m in sizes for kind in kinds]
    peaks = [peak_bytes(job.spec, v, job.cluster, job.backend) for v in variants]
    peak, leanest = min(zip(peaks, variants, strict=True), key=lambda pair: pair[0])
    host, nvme = host_and_nvme_bytes(job.spec, leanest, job.cluster)
    capacity = job.cluster.host_memory_bytes or float("inf")
    drives = job.cluster.nvme_bytes or float("inf")  # without drives nothing goes to them
    shares = (peak / job.usable_bytes, host / capacity, nvme / drives)
    # Lacking one kind of memory is nearer than lacking both.
    lacking = (sum(share > 1 for share in shares), max(shares))
    if result.closest is None or lacking < result.closest.lacking:
        result.closest = Closest(leanest, peak, host, nvme, lacking)
    if peak > job.usable_bytes:
        detail = (
            f"needs {peak / GIB:.1f} of {job.cluster.device.memory_bytes / GIB:.1f} GiB "
            f"({100 * job.headroom:.0f}% kept free)"
        )
        reason = "too little device memory even at micro-batch 1 with recomputation"
        result.reject(leanest, reason, detail)
    elif host > capacity:
        detail = f"needs {host / GIB:.0f} of {capacity / GIB:.0f} GiB in each node's memory"
        result.reject(leanest, "too little host memory to offload to", detail)
    elif nvme > drives:
        detail = f"needs {nvme / GIB:.0f} of {drives / GIB:.0f} GiB on each node's drives"
        result.reject(leanest, "too little NVMe to offload to", detail)
    return lacking[0] == 0


def _one_pass(job: Job, shape: Layout) -> int:
    """The micro-batch that takes a replica's whole step, where that saves gradient memory."""
    whole = job.global_batch // shape.dp
    return whole if job.backend.lazy_gradients and whole <= MAX_MICRO_BATCH else shape.micro_batch
