"""What each global of a checkpoint's pickle means here. Exact (module, name) only; nothing imports.

The list is what torch, DeepSpeed, Megatron-LM, Megatron-DeepSpeed and torch.distributed were seen
to write (``docs/convert.md``, "Safety"), with the module paths of older versions as aliases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from fastllm_convert.dtypes import BY_STORAGE, BY_TORCH


class Call:
    """An object that was never made: the name of its class, its arguments, its pickled state."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name = name
        self.args = args
        self.state: Any = None

    def __repr__(self) -> str:
        return f"<{self.name}>"

    @property
    def attributes(self) -> dict[str, Any]:
        """The instance's ``__dict__``, when that is how it was pickled."""
        state: object = self.state
        return cast("dict[str, Any]", state) if isinstance(state, dict) else {}

    def check_array_state(self) -> None:
        """numpy's ndarray state is (version, shape, dtype, is_fortran, bytes). No object arrays."""
        state: Any = self.state
        if not isinstance(state, tuple):
            raise ValueError("numpy array state is not a tuple")
        items = cast("tuple[Any, ...]", state)
        if len(items) != 5 or not isinstance(items[4], bytes):
            raise ValueError("numpy array without plain bytes")


class Rebuild:
    """A tensor: ``offset`` and ``strides`` in elements of ``storage`` (not yet bounds-checked)."""

    __slots__ = ("offset", "shape", "storage", "strides")

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_rest: Any) -> None:
        self.storage = storage
        self.offset = offset
        self.shape = shape
        self.strides = strides


class Global:
    """One allowed global: ``read`` turns its call's arguments into inert data."""

    __slots__ = ("attribute", "is_storage", "name", "read")

    def __init__(
        self,
        module: str,
        attribute: str,
        read: Callable[[tuple[Any, ...]], Any] | None = None,
        *,
        is_storage: bool = False,
    ) -> None:
        self.name = f"{module}.{attribute}"
        self.attribute = attribute
        self.is_storage = is_storage
        self.read = read if read is not None else self._record

    def __repr__(self) -> str:
        return f"<{self.name}>"

    def _record(self, args: tuple[Any, ...]) -> Any:
        return Call(self.name, args)


def _not_callable(args: tuple[Any, ...]) -> Any:
    raise ValueError(f"it is not called in a checkpoint ({len(args)} arguments)")


def _ordered_dict(args: tuple[Any, ...]) -> Any:
    if not args:
        return {}
    if len(args) == 1 and isinstance(args[0], list):  # protocol 0/1: a list of pairs
        return {pair[0]: pair[1] for pair in cast("list[Any]", args[0])}
    raise ValueError("unexpected arguments")


def _size(args: tuple[Any, ...]) -> Any:
    items: Any = args[0] if args else ()
    if len(args) > 1 or not isinstance(items, tuple | list):
        raise ValueError("torch.Size of something else than a tuple")
    return tuple(cast("list[Any]", items))


def _rebuild(args: tuple[Any, ...]) -> Any:
    return Rebuild(*args)


def _rebuild_parameter(args: tuple[Any, ...]) -> Any:
    if not args or not isinstance(args[0], Rebuild):
        raise ValueError("a parameter without a tensor")
    return args[0]


def _rebuild_from_type(args: tuple[Any, ...]) -> Any:
    """``_rebuild_from_type_v2(func, type, args, state)``: func must be the plain tensor rebuild."""
    func = args[0]
    if not isinstance(func, Global) or func.read is not _rebuild or not isinstance(args[2], tuple):
        raise ValueError("not a plain tensor")
    return Rebuild(*cast("tuple[Any, ...]", args[2]))


def _numpy_dtype(args: tuple[Any, ...]) -> Any:
    if not args or not isinstance(args[0], str) or "O" in args[0] or "V" in args[0]:
        raise ValueError(f"numpy dtype {args[0] if args else None!r}")
    return Call("numpy.dtype", args)


def _numpy_array(args: tuple[Any, ...]) -> Any:
    """``_reconstruct(ndarray, shape, b'b')``: the typecode is always that placeholder."""
    if len(args) != 3 or args[2] not in (b"b", "b"):
        raise ValueError("numpy array of objects")
    return Call("numpy.ndarray", args)


def _encode(args: tuple[Any, ...]) -> Any:
    """``_codecs.encode(text, 'latin1')``: how protocol 2 spells a bytes object."""
    if len(args) != 2 or not isinstance(args[0], str) or args[1] != "latin1":
        raise ValueError("not latin1 text")
    return args[0].encode("latin1", "strict")


_INERT = """
argparse Namespace
types SimpleNamespace
deepspeed.runtime.fp16.loss_scaler LossScaler
deepspeed.runtime.fp16.loss_scaler DynamicLossScaler
deepspeed.runtime.zero.config ZeroStageEnum
deepspeed.utils.tensor_fragment fragment_address
megatron.core.enums ModelType
megatron.model.enums ModelType
megatron.enums ModelType
megatron.core.transformer.enums AttnBackend
megatron.core.transformer.enums AttnMaskType
megatron.core.transformer.enums LayerType
megatron.core.transformer.enums AttnType
megatron.core.transformer.enums ModelType
megatron.core.rerun_state_machine RerunMode
megatron.core.rerun_state_machine RerunState
megatron.core.rerun_state_machine RerunDiagnostic
signal Signals
numpy ndarray
numpy.core.multiarray scalar
numpy._core.multiarray scalar
torch.distributed.checkpoint.metadata Metadata
torch.distributed.checkpoint.metadata TensorStorageMetadata
torch.distributed.checkpoint.metadata BytesStorageMetadata
torch.distributed.checkpoint.metadata TensorProperties
torch.distributed.checkpoint.metadata ChunkStorageMetadata
torch.distributed.checkpoint.metadata MetadataIndex
torch.distributed.checkpoint.metadata StorageMeta
torch.distributed.checkpoint.metadata _MEM_FORMAT_ENCODING
torch.distributed.checkpoint.filesystem _StorageInfo
torch.distributed.checkpoint.filesystem _StoragePrefix
torch.distributed.checkpoint.planner SavePlan
torch.distributed.checkpoint.planner WriteItem
torch.distributed.checkpoint.planner WriteItemType
torch.distributed.checkpoint.planner TensorWriteData
torch.distributed.checkpoint.planner BytesIOWriteData
torch.serialization _get_layout
torch device
pathlib PosixPath
pathlib._local PosixPath
builtins slice
"""


def _table() -> dict[tuple[str, str], Global]:
    table: dict[tuple[str, str], Global] = {}

    def add(
        module: str, name: str, read: Callable[[tuple[Any, ...]], Any] | None = None, **kw: bool
    ) -> None:
        table[module, name] = Global(module, name, read, **kw)

    add("collections", "OrderedDict", _ordered_dict)
    add("torch", "Size", _size)
    for name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
        add("torch._utils", name, _rebuild)
    add("torch._utils", "_rebuild_parameter", _rebuild_parameter)
    add("torch._tensor", "_rebuild_from_type_v2", _rebuild_from_type)
    add("torch", "Tensor", _not_callable)
    add("torch.nn.parameter", "Parameter", _not_callable)
    for dtype in BY_TORCH:
        add("torch", dtype, _not_callable)
    for storage in BY_STORAGE:
        add("torch", storage, _not_callable, is_storage=True)
    add("numpy", "dtype", _numpy_dtype)
    add("_codecs", "encode", _encode)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        add(module, "_reconstruct", _numpy_array)
    for line in _INERT.split("\n"):
        if line:
            module, name = line.split(" ")
            add(module, name)
    return table


GLOBALS = _table()
