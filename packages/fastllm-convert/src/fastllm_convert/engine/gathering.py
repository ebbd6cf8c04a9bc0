"""Windows: elements picked from mapped sources with numpy, cast when asked to.

Buffers are kept per thread and bounded by ``tasks.CHUNK``: fresh ones would cost a page fault per
4 KB of every window.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastllm_convert.arrays import Array, Box
from fastllm_convert.dtypes import DType, numpy_float, raw_numpy
from fastllm_convert.engine.sources import Sources
from fastllm_convert.engine.tasks import CHUNK, Window
from fastllm_convert.errors import UserError


class _Scratch(threading.local):
    """Per-thread buffers, by use."""

    def __init__(self) -> None:
        self._held: dict[str, npt.NDArray[np.uint8]] = {}

    def get(self, use: str, shape: Sequence[int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        nbytes = math.prod(shape) * dtype.itemsize
        held = self._held.get(use)
        if held is None or held.size < nbytes:
            held = self._held[use] = np.empty(max(nbytes, CHUNK), np.uint8)
        return held[:nbytes].view(dtype).reshape(shape)


_scratch = _Scratch()


def gather(window: Window, dtype: DType, sources: Sources) -> npt.NDArray[Any] | None:
    """The window's elements as one C-ordered buffer. None: nothing but zeros (holes, padding).

    The buffer is this thread's own and is used again by its next gather.
    """
    raw = raw_numpy(dtype)
    buffer = _scratch.get("gather", window.shape, raw)
    empty = True
    for box in window.boxes:
        low = tuple(max(b, s) for b, s in zip(box.start, window.start, strict=True))
        high = tuple(
            min(b + m, s + n)
            for b, m, s, n in zip(box.start, box.shape, window.start, window.shape, strict=True)
        )
        place = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, window.start, strict=True))
        view = _view(box, low, high, raw, sources)
        if view is None:
            buffer[place] = 0
        else:
            buffer[place] = view
            empty = False
    return None if empty else buffer


def _view(
    box: Box,
    low: Sequence[int],
    high: Sequence[int],
    raw: np.dtype[Any],
    sources: Sources,
) -> npt.NDArray[Any] | None:
    if box.file is None:
        return None
    source = sources[box.file]
    shape = tuple(b - a for a, b in zip(low, high, strict=True))
    offset = box.offset + sum(
        (a - b) * step for a, b, step in zip(low, box.start, box.strides, strict=True)
    )
    last = offset + sum((n - 1) * step for n, step in zip(shape, box.strides, strict=True))
    if source.sparse and not source.has_data(offset, last + raw.itemsize):
        return None
    if last + raw.itemsize > source.size:  # np.ndarray checks, but its words are not for users
        raise UserError(f"{source.path}: a tensor reaches past the end of the file")
    # A view of unaligned bytes: numpy copies such arrays correctly, at memcpy speed for rows.
    whole = source.whole(math.prod(shape) * raw.itemsize)
    return np.ndarray(shape, raw, buffer=whole, offset=offset, strides=box.strides)


def cast(buffer: npt.NDArray[Any], source: DType, target: DType) -> tuple[npt.NDArray[Any], int]:
    """Round to nearest, ties to even (IEEE 754; numpy's and ml_dtypes' conversion).

    Also returns how many finite values became infinite.
    """
    if not (source.floating and target.floating):
        raise UserError(f"cannot cast {source.code} to {target.code}")
    if source.code == "BF16" and target.code == "F32":
        # bfloat16 is the upper half of a float32: widening is a shift, and exact.
        wide = _scratch.get("cast", buffer.shape, np.dtype(np.uint32))
        return np.left_shift(buffer, np.uint32(16), out=wide, dtype=np.uint32), 0
    values = buffer.view(numpy_float(source))
    result = _scratch.get("cast", buffer.shape, numpy_float(target))
    with np.errstate(over="ignore", invalid="ignore"):
        np.copyto(result, values, casting="unsafe")
    overflowed = 0
    if _RANGE[target.code] < _RANGE[source.code]:
        overflowed = int(np.count_nonzero(~np.isfinite(result)))
        if overflowed:
            overflowed -= int(np.count_nonzero(~np.isfinite(values)))
    return result.view(raw_numpy(target)), overflowed


# Exponents of the largest finite value: which casts can overflow.
_RANGE = {"F64": 1023, "F32": 127, "BF16": 126, "F16": 15, "F8_E5M2": 15, "F8_E4M3": 8}


def window_bytes(
    window: Window, array: Array, target: DType, sources: Sources
) -> tuple[memoryview, int] | None:
    """(the window's bytes as ``target``, values that became infinite). None: zeros."""
    buffer = gather(window, array.dtype, sources)
    if buffer is None:
        return None
    overflowed = 0
    if target != array.dtype:
        buffer, overflowed = cast(buffer, array.dtype, target)
    return buffer.reshape(-1).view(np.uint8).data, overflowed
