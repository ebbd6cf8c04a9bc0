"""Which layers each pipeline stage holds. Pure: no torch, no process group."""

from __future__ import annotations

from collections.abc import Sequence

from fastllm_planner.arch import ArchSpec, ParamSpec
from fastllm_planner.flops import attention_key_width, attention_linear_flops, mlp_flops


def layer_costs(spec: ArchSpec, seq_len: int) -> list[float]:
    """Forward FLOPs per token of every layer, causal attention over ``seq_len`` tokens."""
    scores = 2.0 * attention_key_width(spec) * seq_len / 2
    return [
        attention_linear_flops(spec) + scores + mlp_flops(spec, layer)
        for layer in range(spec.layers)
    ]


def split_layers(spec: ArchSpec, seq_len: int, stages: int) -> tuple[range, ...]:
    """Consecutive layers for each stage, at least one each, such that the slowest stage is as fast
    as can be. The head counts on the last stage; the embedding is a look-up and costs nothing."""
    tail = 2.0 * spec.vocab * spec.hidden
    return split_by_cost(layer_costs(spec, seq_len), tail, stages)


def split_by_cost(costs: Sequence[float], tail: float, stages: int) -> tuple[range, ...]:
    """Cut ``costs`` into ``stages`` consecutive parts; the last part costs ``tail`` more. Least
    maximum first, then least sum of squares (the most even of those)."""
    count = len(costs)
    if not 1 <= stages <= count:
        raise ValueError(f"{count} layers do not split into {stages} stages")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)

    def cost_of(first: int, end: int, stage: int) -> float:
        return sums[end] - sums[first] + (tail if stage == stages - 1 else 0.0)

    def best(bound: float, power: int) -> tuple[float, list[int]] | None:
        """Least Σ cost^power (power 0: least maximum) with no stage above ``bound``, and ends."""
        reach: list[tuple[float, list[int]] | None] = [(0.0, [])] + [None] * count
        for stage in range(stages):
            new: list[tuple[float, list[int]] | None] = [None] * (count + 1)
            for end in range(stage + 1, count - (stages - stage - 1) + 1):
                for first in range(stage, end):
                    before = reach[first]
                    cost = cost_of(first, end, stage)
                    if before is None or cost > bound:
                        continue
                    total = max(before[0], cost) if power == 0 else before[0] + cost**power
                    found = new[end]
                    if found is None or total < found[0]:
                        new[end] = (total, [*before[1], end])
            reach = new
        return reach[count]

    least = best(float("inf"), 0)
    assert least is not None
    even = best(least[0] * (1 + 1e-9), 2)
    assert even is not None
    ends = even[1]
    return tuple(range(a, b) for a, b in zip([0, *ends], ends, strict=False))


def stage_of(param: ParamSpec, split: Sequence[range]) -> int:
    """The stage whose optimizer owns ``param``. A tied head is the embedding, on the first."""
    if param.layer is not None:
        return next(i for i, layers in enumerate(split) if param.layer in layers)
    if param.stage == "embedding" or param.tied_to is not None:
        return 0
    return len(split) - 1
