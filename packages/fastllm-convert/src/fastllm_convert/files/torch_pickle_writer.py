"""Emits the pickle of a ``torch.save`` file from plain data, without torch and without pickle.

Only what a checkpoint needs: dicts, lists, tuples, text, numbers, None, tensors, torch dtypes,
``torch.Size`` and ``argparse.Namespace``. Protocol 2, as torch writes.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from fastllm_convert.arrays import Array, contiguous_strides
from fastllm_convert.dtypes import DType


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor to store, as ``dtype``. The same object twice shares one storage (tied weights)."""

    array: Array
    dtype: DType


@dataclass(frozen=True, slots=True)
class Size:
    """``torch.Size``."""

    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Namespace:
    """``argparse.Namespace``."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ordered:
    """``collections.OrderedDict``."""

    values: Mapping[str, Any]


class _Emitter:
    def __init__(self) -> None:
        self.out = bytearray(b"\x80\x02")
        self.storages: list[Tensor] = []
        self._keys: dict[int, int] = {}

    def text(self, value: str) -> None:
        raw = value.encode("utf-8")
        self.out += b"X" + struct.pack("<I", len(raw)) + raw

    def integer(self, value: int) -> None:
        if 0 <= value < 256:
            self.out += b"K" + bytes([value])
        elif -(1 << 31) <= value < 1 << 31:
            self.out += b"J" + struct.pack("<i", value)
        else:
            raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self.out += b"\x8a" + bytes([len(raw)]) + raw

    def name(self, module: str, attribute: str) -> None:
        self.out += f"c{module}\n{attribute}\n".encode()

    def items(self, mapping: Mapping[Any, Any]) -> None:
        if not mapping:
            return
        self.out += b"("
        for key, value in mapping.items():
            self.value(key)
            self.value(value)
        self.out += b"u"

    def sequence(self, values: list[Any] | tuple[Any, ...]) -> None:
        if isinstance(values, tuple):
            self.out += b"("
            for value in values:
                self.value(value)
            self.out += b"t"
            return
        self.out += b"]("
        for value in values:
            self.value(value)
        self.out += b"e"

    def value(self, value: Any) -> None:
        if value is None:
            self.out += b"N"
        elif value is True or value is False:
            self.out += b"\x88" if value else b"\x89"
        elif isinstance(value, int):
            self.integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            self.text(value)
        elif isinstance(value, dict):
            self.out += b"}"
            self.items(cast("dict[Any, Any]", value))
        elif isinstance(value, list | tuple):
            self.sequence(cast("list[Any] | tuple[Any, ...]", value))
        else:
            self._object(value)

    def _object(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, DType):
            self.name("torch", value.torch)
        elif isinstance(value, Size):
            self.name("torch", "Size")
            self.value((value.shape,))
            self.out += b"R"
        elif isinstance(value, Ordered):
            self.name("collections", "OrderedDict")
            self.out += b")R"
            self.items(value.values)
        elif isinstance(value, Namespace):
            self.name("argparse", "Namespace")
            self.out += b")\x81}"
            self.items(value.values)
            self.out += b"b"
        else:
            raise TypeError(f"cannot pickle a {type(value).__name__}")

    def _tensor(self, tensor: Tensor) -> None:
        """``_rebuild_tensor_v2(storage, 0, shape, strides, requires_grad, hooks)``."""
        key = self._keys.setdefault(id(tensor), len(self.storages))
        if key == len(self.storages):
            self.storages.append(tensor)
        self.name("torch._utils", "_rebuild_tensor_v2")
        self.out += b"(("
        self.text("storage")
        self.name("torch", tensor.dtype.storage)
        self.text(str(key))
        self.text("cpu")
        self.integer(tensor.array.numel)
        self.out += b"tQK\x00"
        self.value(tensor.array.shape)
        self.value(contiguous_strides(tensor.array.shape, 1))
        self.out += b"\x89"
        self.name("collections", "OrderedDict")
        self.out += b")RtR"


def dumps(value: Any) -> tuple[bytes, list[Tensor]]:
    """(pickle, storages in the order of their keys 0, 1, ...)."""
    emitter = _Emitter()
    emitter.value(value)
    return bytes(emitter.out) + b".", emitter.storages
