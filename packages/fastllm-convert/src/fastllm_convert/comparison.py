"""Two checkpoints side by side, tensor by tensor, in bounded memory."""

from __future__ import annotations

from dataclasses import dataclass

from fastllm_convert.checkpoint import Checkpoint, name_list
from fastllm_convert.dtypes import BY_CODE
from fastllm_convert.engine.equality import first_difference
from fastllm_convert.engine.sources import Sources
from fastllm_planner.arch import spec_to_dict


@dataclass(frozen=True)
class Comparison:
    """``largest``: greatest absolute difference found (0.0 when bit-exact)."""

    equal: bool
    tensors: int
    largest: float
    differences: list[str]
    architecture: list[str]


# Fields that do not change a forward pass, or that most formats cannot store.
_NOT_COMPARED = frozenset({"bos_token_id", "eos_token_id", "init_std", "max_seq_len", "family"})


def compare(a: Checkpoint, b: Checkpoint, tolerance: float | None) -> Comparison:
    """``tolerance`` None: every bit and type; else absolute, compared in float64."""
    architecture = _architecture(a, b)
    differences: list[str] = []
    only_a = [n for n in a.tensors if n not in b.tensors]
    only_b = [n for n in b.tensors if n not in a.tensors]
    if only_a:
        differences.append(f"only the first has {name_list(only_a)}")
    if only_b:
        differences.append(f"only the second has {name_list(only_b)}")
    largest = 0.0
    shared = [n for n in a.tensors if n in b.tensors]
    with Sources() as sources:
        for name in shared:
            x, y = a.tensors[name], b.tensors[name]
            if x.shape != y.shape:
                differences.append(f"{name}: shapes {list(x.shape)} and {list(y.shape)}")
                continue
            if tolerance is None and x.dtype != y.dtype:
                differences.append(f"{name}: types {x.dtype} and {y.dtype}")
                continue
            kind = x.dtype if x.dtype == y.dtype else BY_CODE["F64"]
            gap = first_difference(x, y, sources, kind)
            if gap is None:
                continue
            largest = max(largest, gap)
            if tolerance is None or not gap <= tolerance:
                differences.append(f"{name}: differs by up to {gap:.3g}")
    equal = not differences and not architecture
    return Comparison(equal, len(shared), largest, differences, architecture)


def _architecture(a: Checkpoint, b: Checkpoint) -> list[str]:
    x, y = spec_to_dict(a.spec), spec_to_dict(b.spec)
    keys = [k for k in sorted({*x, *y}) if k not in _NOT_COMPARED]
    return [f"config: {k} is {x.get(k)} and {y.get(k)}" for k in keys if x.get(k) != y.get(k)]
