"""Lazy arrays against numpy: any sequence of rearrangements gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm_convert.arrays import Array, SourceFile, concat, from_file, zeros
from fastllm_convert.dtypes import BY_CODE
from fastllm_convert.engine import tasks as cutting
from fastllm_convert.engine.copying import Output, run_task
from fastllm_convert.engine.plan import Piece
from fastllm_convert.engine.sources import Sources
from fastllm_convert.engine.tasks import tasks

U16 = BY_CODE["U16"]


def materialise(array: Array, target: Path, *, crc: bool = False) -> np.ndarray:
    """Through the real copying engine and a real file."""
    piece = Piece("x", 0, array, array.dtype)
    target.write_bytes(bytes(piece.nbytes))
    with target.open("r+b") as file, Sources() as sources:
        for task in tasks(piece):
            run_task(task, piece, sources, Output(file.fileno()), want_crc=crc)
    return np.frombuffer(target.read_bytes(), np.uint16).reshape(array.shape)


@st.composite
def rearranged(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, tuple[int, ...]]]]:
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    steps: list[tuple[str, tuple[int, ...]]] = []
    now = list(shape)
    for _ in range(draw(st.integers(0, 6))):
        kind = draw(st.sampled_from(["slice", "transpose", "split", "merge", "double", "reshape"]))
        axis = draw(st.integers(0, len(now) - 1))
        if kind == "slice":
            low = draw(st.integers(0, now[axis] - 1))
            high = draw(st.integers(low + 1, now[axis]))
            steps.append((kind, (axis, low, high)))
            now[axis] = high - low
        elif kind == "transpose":
            axes = draw(st.permutations(range(len(now))))
            steps.append((kind, tuple(axes)))
            now = [now[a] for a in axes]
        elif kind == "split" and len(now) < 5:
            inner = draw(
                st.sampled_from([d for d in range(1, now[axis] + 1) if now[axis] % d == 0])
            )
            steps.append((kind, (axis, now[axis] // inner, inner)))
            now[axis : axis + 1] = [now[axis] // inner, inner]
        elif kind == "merge" and axis + 1 < len(now):
            steps.append((kind, (axis,)))
            now[axis : axis + 2] = [now[axis] * now[axis + 1]]
        elif kind == "double" and int(np.prod(now)) < 2000:
            steps.append((kind, (axis,)))
            now[axis] *= 2
        elif kind == "reshape":
            steps.append((kind, tuple(reversed(now))))
            now.reverse()
    return shape, steps


def both(
    array: Array, values: np.ndarray, kind: str, args: tuple[int, ...]
) -> tuple[Array, np.ndarray]:
    if kind == "slice":
        axis, low, high = args
        return array.slice(axis, low, high), values.take(range(low, high), axis)
    if kind == "transpose":
        return array.transpose(*args), values.transpose(args)
    if kind == "split":
        axis, outer, inner = args
        shape = (*values.shape[:axis], outer, inner, *values.shape[axis + 1 :])
        return array.split_axis(axis, outer, inner), values.reshape(shape)
    if kind == "merge":
        (axis,) = args
        shape = (*values.shape[:axis], -1, *values.shape[axis + 2 :])
        return array.merge_axes(axis), values.reshape(shape)
    if kind == "double":
        return concat([array, array], args[0]), np.concatenate([values, values], args[0])
    return array.reshape(*args), values.reshape(args)


@settings(max_examples=300, deadline=None)
@given(rearranged(), st.integers(0, 9))
def test_any_rearrangement_equals_numpys(
    case: tuple[list[int], list[tuple[str, tuple[int, ...]]]], pad: int
) -> None:
    import tempfile

    shape, steps = case
    values = np.arange(int(np.prod(shape)), dtype=np.uint16).reshape(shape)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "source"
        source.write_bytes(bytes(pad) + values.tobytes())  # unaligned on purpose
        file = SourceFile(source, pad + values.nbytes)
        array = from_file(file, pad, shape, U16)
        for kind, args in steps:
            array, values = both(array, values, kind, args)
        covered = sum(int(np.prod(b.shape)) for b in array.boxes())
        assert covered == values.size, "boxes do not tile the array"
        assert np.array_equal(materialise(array, Path(scratch) / "out"), values)


def test_large_tensors_are_cut_into_bounded_tasks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "CHUNK", 1 << 12)
    monkeypatch.setattr(cutting, "RUN_CHUNK", 1 << 12)
    monkeypatch.setattr(cutting, "MIN_RUN", 1)
    values = np.random.default_rng(0).integers(0, 1 << 16, (300, 70), np.uint16)
    source = tmp_path / "source"
    source.write_bytes(values.tobytes())
    array = from_file(SourceFile(source, values.nbytes), 0, values.shape, U16)
    for candidate, expected in ((array, values), (array.transpose(1, 0), values.T)):
        cut = tasks(Piece("x", 0, candidate, U16))
        assert len(cut) > 5
        assert max(t.nbytes for t in cut) <= 1 << 12
        assert sum(t.nbytes for t in cut) == values.nbytes
        assert np.array_equal(materialise(candidate, tmp_path / "out"), expected)


def test_padding_and_repeated_rows(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.uint16).reshape(3, 2)
    source = tmp_path / "source"
    source.write_bytes(values.tobytes())
    array = from_file(SourceFile(source, 12), 0, (3, 2), U16)
    padded = concat([array, zeros((2, 2), U16), array.slice(0, 2, 3).repeat_first(3)], 0)
    expected = np.concatenate([values, np.zeros((2, 2), np.uint16), np.tile(values[2:], (3, 1))])
    assert np.array_equal(materialise(padded, tmp_path / "out"), expected)


def test_mixed_types_and_shapes_are_refused() -> None:
    a, b = zeros((2, 2), U16), zeros((2, 2), BY_CODE["F32"])
    with pytest.raises(ValueError, match="types"):
        concat([a, b])
    with pytest.raises(ValueError, match="shapes"):
        concat([a, zeros((2, 3), U16)])
    with pytest.raises(ValueError, match="slice"):
        a.slice(0, 1, 3)
    with pytest.raises(ValueError, match="reshape"):
        a.reshape(3, 2)


@pytest.mark.parametrize("crc", [False, True])
def test_crc_of_pieces_is_that_of_the_bytes(tmp_path: Path, crc: bool) -> None:
    import zlib

    values = np.random.default_rng(1).integers(0, 1 << 16, (64, 2048), np.uint16)
    source = tmp_path / "source"
    source.write_bytes(values.tobytes())
    array = from_file(SourceFile(source, values.nbytes), 0, values.shape, U16)
    piece = Piece("x", 0, array.slice(0, 1, 64), U16)
    out = tmp_path / "out"
    out.write_bytes(b"")
    with out.open("r+b") as file, Sources() as sources:
        (task,) = tasks(piece)
        found = run_task(task, piece, sources, Output(file.fileno()), want_crc=crc).crc
    assert out.read_bytes() == values[1:].tobytes()
    assert found == (zlib.crc32(values[1:].tobytes()) if crc else 0)
