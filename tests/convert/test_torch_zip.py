"""torch.save files: what torch writes is read bit for bit; hostile or damaged ones are refused."""

from __future__ import annotations

import argparse
import collections
import importlib
import io
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm_convert.arrays import Array
from fastllm_convert.errors import UserError
from fastllm_convert.files import torch_pickle
from fastllm_convert.files.torch_globals import Call
from fastllm_convert.files.torch_zip import check_crc, read_torch


def bytes_of(array: Array) -> bytes:
    """Contiguous single-box arrays only."""
    (box,) = array.boxes()
    assert box.file is not None
    data = box.file.path.read_bytes()
    return data[box.offset : box.offset + array.nbytes]


def save(tmp_path: Path, value: object) -> Path:
    path = tmp_path / "x.pt"
    torch.save(value, path)
    return path


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.int64,
        torch.uint8,
        torch.bool,
    ],
)
def test_every_type(tmp_path: Path, dtype: torch.dtype) -> None:
    value = torch.arange(24).reshape(4, 6).to(dtype)
    found = read_torch(save(tmp_path, {"w": value})).entries["w"]
    assert found.shape == (4, 6)
    assert found.dtype.torch == str(dtype).removeprefix("torch.")
    assert bytes_of(found) == value.view(torch.uint8).numpy().tobytes()


def test_views_of_one_storage_and_strides(tmp_path: Path) -> None:
    base = torch.arange(40, dtype=torch.float32)
    value = {
        "a": base[8:20].view(3, 4),
        "t": base[:12].view(3, 4).t(),
        "p": torch.nn.Parameter(base),
    }
    found = read_torch(save(tmp_path, value)).entries
    assert bytes_of(found["a"]) == base[8:20].numpy().tobytes()
    (box,) = found["t"].boxes()
    assert box.shape == (4, 3)
    assert box.strides == (4, 16)
    assert found["p"].shape == (40,)


def test_plain_data_and_inert_objects(tmp_path: Path) -> None:
    value = {
        "args": argparse.Namespace(hidden_size=8, params_dtype=torch.bfloat16),
        "od": collections.OrderedDict(a=torch.Size([2, 3]), b=[1, -7, 1 << 40, 2.5, None, True]),
        "rng": (np.random.RandomState(0).get_state(), random.Random(0).getstate()),
        "text": "日本",
    }
    found = read_torch(save(tmp_path, value)).entries
    assert isinstance(found["args"], Call)
    assert found["args"].name == "argparse.Namespace"
    assert found["args"].attributes["hidden_size"] == 8
    assert repr(found["args"].attributes["params_dtype"]) == "<torch.bfloat16>"
    assert found["od"] == {"a": (2, 3), "b": [1, -7, 1 << 40, 2.5, None, True]}
    assert found["text"] == "日本"


class Evil:
    """Unpickling this would create the file ``evil``."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (eval, ("__import__('pathlib').Path('evil').touch()",))


class Unknown:
    pass


@pytest.mark.parametrize(
    ("value", "needle"),
    [
        ({"ok": torch.zeros(2), "x": Evil()}, "eval"),
        ({"x": Unknown()}, "Unknown"),
        ({"x": np.array([object()], dtype=object)}, "numpy"),
        ({"x": io.BytesIO(b"")}, "BytesIO"),
        ({"x": {1, 2}}, "set"),
    ],
)
def test_nothing_is_ever_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: object, needle: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=needle):
        read_torch(save(tmp_path, value))
    assert not Path("evil").exists()


@pytest.mark.parametrize(
    "opcode", [b"i", b"o", b"P", b"\x82", b"\x83", b"\x84", b"\x92", b"I", b"L", b"F"]
)
def test_other_opcodes_are_refused(opcode: bytes) -> None:
    with pytest.raises(torch_pickle.PickleError, match="refused"):
        torch_pickle.load(b"\x80\x02" + opcode, lambda s: s)


def raw(path: Path, edit: dict[str, bytes], *, name: str = "archive", extra: bytes = b"") -> Path:
    """An archive made by zipfile from raw members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for member, content in edit.items():
            archive.writestr(f"{name}/{member}", content)
    path.write_bytes(path.read_bytes() + extra)
    return path


def tensor_pickle(
    *,
    key: str = "0",
    numel: int = 4,
    offset: int = 0,
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
) -> bytes:
    class Rebuild:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            storage = Persistent()
            rebuild = importlib.import_module("torch._utils")._rebuild_tensor_v2
            return rebuild, (storage, offset, shape, strides, False, {})

    class Persistent:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, obj: object) -> object:
            if isinstance(obj, Persistent):
                return ("storage", torch.FloatStorage, key, "cpu", numel)
            return None

    out = io.BytesIO()
    Pickler(out, 2).dump({"w": Rebuild()})
    return out.getvalue()


GOOD = {"byteorder": b"little", "data/0": bytes(16)}


def test_the_hand_made_archive_is_sound(tmp_path: Path) -> None:
    found = read_torch(raw(tmp_path / "x.pt", {"data.pkl": tensor_pickle(), **GOOD})).entries["w"]
    assert found.shape == (4,)


@pytest.mark.parametrize(
    ("fields", "needle"),
    [
        ({"numel": 1 << 62}, "claims"),
        ({"numel": 5}, "claims"),
        ({"shape": (1 << 40,)}, "reaches"),
        ({"offset": -1}, "offset"),
        ({"strides": (-1,)}, "stride"),
        ({"shape": (2,), "strides": (1 << 30,)}, "reaches"),
        ({"key": "99"}, "not in the archive"),
        ({"key": "../x"}, "not a number"),
        ({"shape": (2, 2)}, "strides"),
    ],
)
def test_tensors_stay_inside_their_storage(
    tmp_path: Path, fields: dict[str, object], needle: str
) -> None:
    pickled = tensor_pickle(**fields)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match=needle):
        read_torch(raw(tmp_path / "x.pt", {"data.pkl": pickled, **GOOD}))


def test_archives_that_break_the_format(tmp_path: Path) -> None:
    good = {"data.pkl": tensor_pickle(), **GOOD}
    cases: list[tuple[str, Path]] = [
        ("big-endian", raw(tmp_path / "1", {**good, "byteorder": b"big"})),
        ("not one", raw(tmp_path / "2", {**good, "sub/data.pkl": b"."})),
        ("not one", raw(tmp_path / "3", GOOD)),
        ("no zip directory", raw(tmp_path / "4", good, extra=b"junk")),
    ]
    whole = raw(tmp_path / "5", good)
    (tmp_path / "6").write_bytes(whole.read_bytes()[:-30])
    cases.append(("no zip directory", tmp_path / "6"))
    (tmp_path / "7").write_bytes(b"")
    cases.append(("empty", tmp_path / "7"))
    (tmp_path / "8").write_bytes(pickle.dumps({"w": 1}, 2))
    cases.append(("not a torch zip", tmp_path / "8"))
    with zipfile.ZipFile(tmp_path / "9", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor_pickle())
    cases.append(("compressed", tmp_path / "9"))
    for needle, path in cases:
        with pytest.raises(UserError, match=needle):
            read_torch(path)


def test_local_header_must_agree_with_the_directory(tmp_path: Path) -> None:
    path = raw(tmp_path / "x", {"data.pkl": tensor_pickle(), **GOOD})
    data = bytearray(path.read_bytes())
    data[30:37] = b"ARCHIVE"
    path.write_bytes(data)
    with pytest.raises(UserError, match="local header"):
        read_torch(path)


def test_bombs_are_bounded() -> None:
    nested = b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b"."
    with pytest.raises(torch_pickle.PickleError, match="deeper"):
        torch_pickle.load(nested, lambda s: s)
    laughs = b"\x80\x02]q\x00K\x00a"
    for i in range(40):
        laughs += b"0" if i == 0 else b""
        laughs += b"]q" + bytes([i + 1]) + b"h" + bytes([i]) + b"ah" + bytes([i]) + b"a"
        laughs += b"0" if i < 39 else b""
    with pytest.raises(torch_pickle.PickleError, match="expands"):
        torch_pickle.load(laughs + b".", lambda s: s)
    with pytest.raises(torch_pickle.PickleError, match="contains itself"):
        torch_pickle.load(b"\x80\x02]q\x00h\x00a.", lambda s: s)


def test_wrong_crc_is_found(tmp_path: Path) -> None:
    path = save(tmp_path, {"w": torch.ones(64)})
    found = read_torch(path)
    check_crc(path, found.members)
    (box,) = found.entries["w"].boxes()
    data = bytearray(path.read_bytes())
    data[box.offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="CRC-32"):
        check_crc(path, read_torch(path).members)


def test_zip64_directory(tmp_path: Path) -> None:
    """An archive whose end record refers to a zip64 one, as torch writes beyond 4 GB."""
    path = raw(tmp_path / "x", {"data.pkl": tensor_pickle(), **GOOD})
    data = path.read_bytes()
    count, size, offset = struct.unpack("<HLL", data[-12:-2])
    end64 = struct.pack("<4sQHHLLQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(data) - 22, 1)
    end = struct.pack("<4sHHHHLLH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(data[:-22] + end64 + locator + end)
    assert read_torch(path).entries["w"].shape == (4,)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_damaged_files_never_crash(data: st.DataObject) -> None:
    """Any byte changed, removed or repeated: a value or ``UserError``, nothing else."""
    import tempfile

    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3, 4), "s": torch.Size([2]), "n": argparse.Namespace(a=1)}, buffer)
    raw_bytes = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw_bytes) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            raw_bytes[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del raw_bytes[at : at + data.draw(st.integers(1, 50))]
        else:
            raw_bytes[at:at] = data.draw(st.binary(min_size=1, max_size=20))
        if not raw_bytes:
            return
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "x.pt"
        path.write_bytes(raw_bytes)
        try:
            read_torch(path)
        except UserError:
            return


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
def test_any_pickle_is_a_value_or_an_error(body: bytes) -> None:
    try:
        torch_pickle.load(b"\x80\x02" + body + b".", lambda s: s)
    except torch_pickle.PickleError:
        return


@pytest.mark.shared
def test_reference_hostile_files(golden: Path) -> None:
    """Every file of the manifest gets its verdict."""
    manifest = json.loads((golden / "security" / "manifest.json").read_text())
    judged = 0
    for name, verdict in manifest.items():
        path = golden / "security" / name
        if path.suffix != ".pth":
            continue
        judged += 1
        try:
            check_crc(path, read_torch(path).members)
            accepted = True
        except UserError:
            accepted = False
        assert accepted == verdict.startswith("valid"), (name, verdict)
    assert judged > 20
