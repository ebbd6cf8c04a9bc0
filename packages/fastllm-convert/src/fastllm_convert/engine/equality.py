"""Are two lazy arrays the same, bit for bit or by how much not? In bounded memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fastllm_convert.arrays import Array
from fastllm_convert.dtypes import DType
from fastllm_convert.engine.sources import Sources
from fastllm_convert.engine.tasks import Window, flat_runs, windows
from fastllm_convert.errors import UserError

if TYPE_CHECKING:
    import numpy.typing as npt

_BLOCK = 1 << 20


def check_equal(equal: Sequence[tuple[str, Array, Array]], sources: Sources) -> None:
    """Tensors that the source holds twice must be the same. ``UserError`` names those that differ.

    Norms, which every tensor-parallel rank repeats, are single runs: compared as bytes, without
    numpy.
    """
    for what, a, b in equal:
        if list(a.boxes()) == list(b.boxes()) or _same_runs(a, b, sources):
            continue
        gap = first_difference(a, b, sources)
        if gap is not None:
            raise UserError(
                f"{what} differ (by up to {gap:.3g}), although the model says they are one",
                hint="--untie keeps both" if "tied" in what else "the checkpoint is damaged",
            )


def _same_runs(a: Array, b: Array, sources: Sources) -> bool:
    """True when both are one run of a file with the same bytes; False also when they are not."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    x, y = flat_runs(a), flat_runs(b)
    if x is None or y is None or len(x) != 1 or len(y) != 1:
        return False
    (left,), (right,) = x, y
    if left.source is None or right.source is None:
        return left.source is right.source
    fd, other = sources[left.source].fd, sources[right.source].fd
    for at in range(0, left.nbytes, _BLOCK):
        count = min(_BLOCK, left.nbytes - at)
        if os.pread(fd, count, left.start + at) != os.pread(other, count, right.start + at):
            return False
    return True


def first_difference(
    a: Array, b: Array, sources: Sources, dtype: DType | None = None
) -> float | None:
    """None when equal bit for bit; else the largest absolute difference (inf when types differ)."""
    import numpy as np

    from fastllm_convert.dtypes import numpy_float

    if a.shape != b.shape or (dtype is None and a.dtype != b.dtype):
        return float("inf")
    largest: float | None = None
    kind = a.dtype if dtype is None else dtype
    cuts = (windows(x, kind, widest=8) for x in (a, b))
    for here, there in zip(*cuts, strict=True):
        left = _gathered(a, here, kind, sources).copy()  # the next gather reuses the buffer
        right = _gathered(b, there, kind, sources)
        if np.array_equal(left, right):
            continue
        if not kind.floating:
            return float("inf")
        x = left.view(numpy_float(kind)).astype(np.float64)
        y = right.view(numpy_float(kind)).astype(np.float64)
        gap = np.abs(x - y)
        worst = float("inf") if np.isnan(gap).any() else float(gap.max())
        largest = worst if largest is None else max(largest, worst)
    return largest


def _gathered(array: Array, window: Window, target: DType, sources: Sources) -> npt.NDArray[Any]:
    """One window's elements, as unsigned integers of ``target``'s width; zeros materialised."""
    import numpy as np

    from fastllm_convert.dtypes import raw_numpy
    from fastllm_convert.engine.gathering import cast, gather

    found = gather(window, array.dtype, sources)
    if found is None:
        return np.zeros(window.shape, raw_numpy(target))
    return found if target == array.dtype else cast(found, array.dtype, target)[0]
