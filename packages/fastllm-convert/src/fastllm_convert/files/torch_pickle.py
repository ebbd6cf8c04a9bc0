"""A pickle reader that runs nothing: an interpreter for the opcodes ``torch.save`` emits.

Python's ``pickle`` resolves a GLOBAL by importing it and REDUCE calls the result; both are how a
checkpoint runs code. Here a global is only ever looked up, by its exact (module, name), in a table
of inert readings; whatever is not in the table is refused by name, and so is every other opcode
(INST, OBJ, EXT*, PERSID, REDUCE of anything unknown).

Opcode semantics: https://github.com/python/cpython/blob/main/Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, NamedTuple, cast

from fastllm_convert.errors import UserError
from fastllm_convert.files.torch_globals import GLOBALS, Call, Global

MAX_PICKLE_BYTES = 64 << 20
MAX_OBJECTS = 8_000_000
MAX_DEPTH = 100  # real checkpoints nest about ten deep
# Aliased containers can describe 2^40 elements in a kilobyte ("billion laughs"): bound the size of
# the object as a tree, which is what anyone who walks it sees.
MAX_TREE = 50_000_000


class Storage(NamedTuple):
    """Persistent id of one storage: member ``data/<key>``, ``numel`` elements of ``type_name``."""

    type_name: str
    key: str
    numel: int


class PickleError(UserError):
    """A pickle that is damaged or asks for something this reader does not do."""


_MARK = object()


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        if count < 0 or self.at + count > len(self.data):
            raise PickleError("pickle is cut short")
        self.at += count
        return self.data[self.at - count : self.at]

    def unpack(self, fmt: str) -> Any:
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 1024)
        if end < 0:
            raise PickleError("pickle is cut short")
        raw = self.data[self.at : end]
        self.at = end + 1
        return raw.decode("utf-8", "replace")

    def text(self, count: int) -> str:
        try:
            return self.take(count).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise PickleError("pickle has a string that is not UTF-8") from None


class _Machine:
    """Stack, memo and the handlers. One per pickle."""

    def __init__(self, data: bytes, storages: Callable[[Storage], Any]) -> None:
        self.reader = _Reader(data)
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.storages = storages

    def run(self) -> Any:
        take = self.reader.take
        for _ in range(MAX_OBJECTS):
            code = take(1)[0]
            if code == _STOP:
                if len(self.stack) != 1:
                    raise PickleError("pickle leaves a broken stack")
                return self.pop()
            handler = _HANDLERS.get(code)
            if handler is None:
                raise PickleError(
                    f"pickle opcode 0x{code:02x} at byte {self.reader.at - 1} is refused"
                )
            handler(self)
        raise PickleError(f"pickle has more than {MAX_OBJECTS:,} instructions")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("pickle pops an empty stack")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("pickle reads an empty stack")
        return self.stack[-1]

    def pop_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise PickleError("pickle has no mark")

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError(f"pickle reads memo {index}, which is empty")
        self.push(self.memo[index])

    def put(self, index: int) -> None:
        self.memo[index] = self.top()


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise PickleError("pickle sets items on something that is not a dict")
    mapping = cast("dict[Any, Any]", target)
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | int | float | bytes | tuple | Global | Call | None):
            raise PickleError(f"pickle uses a {type(key).__name__} as a key")
        try:
            mapping[key] = value
        except TypeError:
            raise PickleError("pickle uses a key that cannot be one") from None


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise PickleError("pickle appends to something that is not a list")
    cast("list[Any]", target).extend(items)


def _setitem(m: _Machine) -> None:
    value, key = m.pop(), m.pop()
    _set_items(m.top(), [key, value])


def _setitems(m: _Machine) -> None:
    items = m.pop_mark()
    _set_items(m.top(), items)


def _append(m: _Machine) -> None:
    value = m.pop()
    _extend(m.top(), [value])


def _appends(m: _Machine) -> None:
    items = m.pop_mark()
    _extend(m.top(), items)


def _tuple(count: int) -> Callable[[_Machine], None]:
    def handler(m: _Machine) -> None:
        items = [m.pop() for _ in range(count)]
        m.push(tuple(reversed(items)))

    return handler


def _resolve(module: str, name: str) -> Global:
    found = GLOBALS.get((module, name))
    if found is None:
        raise PickleError(
            f"pickle asks for {module}.{name}",
            hint="only tensors and plain data are read; nothing in a checkpoint is ever run",
        )
    return found


def _global(m: _Machine) -> None:
    module, name = m.reader.line(), m.reader.line()
    m.push(_resolve(module, name))


def _stack_global(m: _Machine) -> None:
    name, module = m.pop(), m.pop()
    if not isinstance(name, str) or not isinstance(module, str):
        raise PickleError("pickle names a global by something that is not text")
    m.push(_resolve(module, name))


def _call(callee: Any, args: Any) -> Any:
    if not isinstance(callee, Global) or not isinstance(args, tuple):
        raise PickleError(f"pickle calls a {type(callee).__name__}")
    try:
        return callee.read(cast("tuple[Any, ...]", args))
    except (TypeError, ValueError, IndexError) as error:
        raise PickleError(f"pickle calls {callee.name} with bad arguments: {error}") from None


def _reduce(m: _Machine) -> None:
    args, callee = m.pop(), m.pop()
    m.push(_call(callee, args))


def _build(m: _Machine) -> None:
    state, target = m.pop(), m.top()
    if isinstance(target, Call):
        target.state = state
        # numpy dtypes carry their kind in the state too; an object array would hold pickles.
        if target.name == "numpy.ndarray":
            try:
                target.check_array_state()
            except ValueError as error:
                raise PickleError(f"pickle has a {error}") from None
    elif not isinstance(target, dict):
        raise PickleError(f"pickle sets the state of a {type(target).__name__}")
    # An OrderedDict's state is its attributes (state_dict's _metadata): nothing here needs them.


def _persistent_id(m: _Machine) -> None:
    pid: Any = m.pop()
    if not isinstance(pid, tuple) or len(cast("tuple[Any, ...]", pid)) != 5:
        raise PickleError("pickle has a persistent id that is not a storage")
    kind, storage_type, key, _location, numel = cast("tuple[Any, ...]", pid)
    if kind != "storage" or not isinstance(storage_type, Global) or not storage_type.is_storage:
        raise PickleError("pickle has a persistent id that is not a storage")
    if not isinstance(key, str) or not key.isascii() or not key.isdigit() or len(key) > 18:
        raise PickleError(f"pickle names storage {key!r}: not a number")
    if type(numel) is not int or numel < 0:
        raise PickleError(f"pickle has a storage of {numel!r} elements")
    m.push(m.storages(Storage(storage_type.attribute, key, numel)))


def _proto(m: _Machine) -> None:
    version = m.reader.unpack("<B")
    if version > 5:
        raise PickleError(f"pickle protocol {version} is unknown")


def _long1(m: _Machine) -> None:
    m.push(int.from_bytes(m.reader.take(m.reader.unpack("<B")), "little", signed=True))


def _pop_mark_tuple(m: _Machine) -> None:
    m.push(tuple(m.pop_mark()))


_STOP = ord(".")
_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    0x80: _proto,
    0x95: lambda m: cast(None, m.reader.unpack("<Q")),  # FRAME: a length, no meaning here
    ord("("): lambda m: m.push(_MARK),
    ord("0"): lambda m: cast(None, m.pop()),
    ord("}"): lambda m: m.push({}),
    ord("]"): lambda m: m.push([]),
    ord(")"): lambda m: m.push(()),
    ord("t"): _pop_mark_tuple,
    0x85: _tuple(1),
    0x86: _tuple(2),
    0x87: _tuple(3),
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("K"): lambda m: m.push(m.reader.unpack("<B")),
    ord("M"): lambda m: m.push(m.reader.unpack("<H")),
    ord("J"): lambda m: m.push(m.reader.unpack("<i")),
    ord("G"): lambda m: m.push(m.reader.unpack(">d")),
    0x8A: _long1,
    ord("X"): lambda m: m.push(m.reader.text(m.reader.unpack("<I"))),
    0x8C: lambda m: m.push(m.reader.text(m.reader.unpack("<B"))),
    ord("U"): lambda m: m.push(m.reader.text(m.reader.unpack("<B"))),
    ord("T"): lambda m: m.push(m.reader.text(m.reader.unpack("<I"))),
    ord("C"): lambda m: m.push(m.reader.take(m.reader.unpack("<B"))),
    ord("B"): lambda m: m.push(m.reader.take(m.reader.unpack("<I"))),
    ord("q"): lambda m: m.put(m.reader.unpack("<B")),
    ord("r"): lambda m: m.put(m.reader.unpack("<I")),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.reader.unpack("<B")),
    ord("j"): lambda m: m.get(m.reader.unpack("<I")),
    ord("s"): _setitem,
    ord("u"): _setitems,
    ord("a"): _append,
    ord("e"): _appends,
    ord("c"): _global,
    0x93: _stack_global,
    ord("R"): _reduce,
    0x81: _reduce,  # NEWOBJ: a class called with its arguments, inert the same way
    ord("b"): _build,
    ord("Q"): _persistent_id,
}


def load(data: bytes, storages: Callable[[Storage], Any]) -> Any:
    """Pickle bytes → plain data, tensors and inert ``Call`` records.

    ``storages`` turns a checked persistent id into what tensors are rebuilt on. Raises
    ``PickleError`` for anything unknown, malformed, too deep or too large.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise PickleError(
            f"pickle of {len(data):,} bytes is beyond the limit of {MAX_PICKLE_BYTES:,}"
        )
    value = _Machine(data, storages).run()
    check_tree(value)
    return value


def _children(value: Any) -> list[Any]:
    if isinstance(value, dict):
        mapping = cast("dict[Any, Any]", value)
        return [*mapping.keys(), *mapping.values()]
    if isinstance(value, list | tuple):
        return list(cast("list[Any]", value))
    if isinstance(value, Call):
        return [value.args, value.state]
    return []


_CONTAINERS: tuple[type, ...] = (dict, list, tuple, Call)


def check_tree(value: Any) -> None:
    """Depth and size as a tree are bounded, and nothing contains itself. Not recursive."""
    sizes: dict[int, int] = {}
    open_ids: set[int] = set()
    stack: list[tuple[Any, list[Any]]] = [(value, _children(value))]
    totals = [1]
    open_ids.add(id(value))
    while stack:
        node, todo = stack[-1]
        if todo:
            child: object = todo.pop()
            if not isinstance(child, _CONTAINERS):
                totals[-1] += 1
            elif (known := sizes.get(id(child))) is not None:
                totals[-1] += known
            elif id(child) in open_ids:
                raise PickleError("pickle has a container that contains itself")
            elif len(stack) >= MAX_DEPTH:
                raise PickleError(f"pickle nests deeper than {MAX_DEPTH}")
            else:
                open_ids.add(id(child))
                stack.append((child, _children(child)))
                totals.append(1)
                continue
        else:
            stack.pop()
            open_ids.discard(id(node))
            size = totals.pop()
            sizes[id(node)] = size
            if totals:
                totals[-1] += size
            else:
                totals.append(size)
        if totals[-1] > MAX_TREE:
            raise PickleError(f"pickle expands to more than {MAX_TREE:,} objects")
