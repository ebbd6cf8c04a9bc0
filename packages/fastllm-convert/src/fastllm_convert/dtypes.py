"""Element types, under the names the three worlds give them.

The key everywhere in this package is the safetensors code (``BF16``). numpy has no bfloat16 or
float8, so bytes move as unsigned integers of the same width; only a cast needs ``ml_dtypes``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastllm_convert.errors import UserError

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class DType:
    """``code``: safetensors; ``torch``: attribute of torch; ``storage``: torch's legacy class."""

    code: str
    itemsize: int
    torch: str
    storage: str
    floating: bool

    def __str__(self) -> str:
        return self.code


_ALL = (
    DType("F64", 8, "float64", "DoubleStorage", True),
    DType("F32", 4, "float32", "FloatStorage", True),
    DType("F16", 2, "float16", "HalfStorage", True),
    DType("BF16", 2, "bfloat16", "BFloat16Storage", True),
    DType("F8_E4M3", 1, "float8_e4m3fn", "", True),
    DType("F8_E5M2", 1, "float8_e5m2", "", True),
    DType("I64", 8, "int64", "LongStorage", False),
    DType("I32", 4, "int32", "IntStorage", False),
    DType("I16", 2, "int16", "ShortStorage", False),
    DType("I8", 1, "int8", "CharStorage", False),
    DType("U64", 8, "uint64", "", False),
    DType("U32", 4, "uint32", "", False),
    DType("U16", 2, "uint16", "", False),
    DType("U8", 1, "uint8", "ByteStorage", False),
    DType("BOOL", 1, "bool", "BoolStorage", False),
)
BY_CODE = {d.code: d for d in _ALL}
BY_TORCH = {d.torch: d for d in _ALL}
BY_STORAGE = {d.storage: d for d in _ALL if d.storage}
BF16, F16, F32 = BY_CODE["BF16"], BY_CODE["F16"], BY_CODE["F32"]
U8 = BY_CODE["U8"]

# What --dtype accepts: the names people type on a command line.
_CAST_NAMES = {
    "bf16": "BF16", "bfloat16": "BF16",
    "fp16": "F16", "float16": "F16", "half": "F16",
    "fp32": "F32", "float32": "F32", "float": "F32",
}  # fmt: skip
CAST_CHOICES = tuple(_CAST_NAMES)

_RAW = {1: "uint8", 2: "uint16", 4: "uint32", 8: "uint64"}


def cast_target(name: str) -> DType:
    """``bf16``, ``float32``, ... → ``DType``."""
    try:
        return BY_CODE[_CAST_NAMES[name.lower()]]
    except KeyError:
        raise UserError(
            f"--dtype {name!r} is not a type weights are stored in", hint="use bf16, fp16 or fp32"
        ) from None


def raw_numpy(dtype: DType) -> np.dtype[Any]:
    """Unsigned integer of the same width: moves bytes without interpreting them."""
    import numpy as np  # 60 ms, a fifth of a small conversion: only where elements are touched

    return np.dtype(_RAW[dtype.itemsize])


def numpy_float(dtype: DType) -> np.dtype[Any]:
    """The arithmetic type (``ml_dtypes`` for bfloat16 and float8)."""
    import numpy as np

    if dtype.code in ("F64", "F32", "F16"):
        return np.dtype(dtype.torch)
    import ml_dtypes  # only a cast needs it

    return np.dtype(getattr(ml_dtypes, dtype.torch))
