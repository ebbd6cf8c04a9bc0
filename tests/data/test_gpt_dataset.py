"""Samples, splits and blends against their definitions, computed the slow way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm_data import GPTDataset, IndexedDataset, IndexedDatasetWriter, UserError, build_datasets
from fastllm_data.build import parse_blend, parse_split, split_documents
from fastllm_data.gpt_dataset import SampleOptions, plan_samples


def dataset(prefix: Path, lengths: list[int]) -> IndexedDataset:
    """Documents of these lengths holding the tokens 1, 2, 3, …"""
    with IndexedDatasetWriter(prefix, "int32") as writer:
        first = 1
        for length in lengths:
            writer.add(range(first, first + length))
            writer.end_document()
            first += length
    return IndexedDataset(prefix)


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12).filter(lambda x: sum(x) > 12),
    seq_len=st.integers(1, 11),
    samples=st.none() | st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
    extra=st.booleans(),
    drop_last=st.booleans(),
)
def test_samples_are_the_stream_cut_up(
    lengths: list[int],
    seq_len: int,
    samples: int | None,
    seed: int,
    extra: bool,
    drop_last: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    source = dataset(tmp_path_factory.mktemp("d") / "x", lengths)
    options = SampleOptions(extra_token=extra, drop_last=drop_last)
    documents = np.arange(len(lengths), dtype=np.int32)
    built = GPTDataset(source, documents, seq_len, samples, seed, options)
    # Shuffled by numpy itself.
    plan = plan_samples(sum(lengths), seq_len, samples, options)
    rng = np.random.RandomState(seed)
    parts = [plan.epochs - 1, 1] if plan.separate_final_epoch else [plan.epochs]
    order = [np.tile(documents, n) for n in parts]
    for part in order:
        rng.shuffle(part)
    numbers = [np.arange(plan.first_part), np.arange(plan.first_part, plan.samples)]
    for part in numbers:
        rng.shuffle(part)
    shuffled = np.concatenate(numbers)
    stream = np.concatenate([source[int(d)] for d in np.concatenate(order)])
    assert len(built) == len(shuffled)
    assert samples is None or len(built) >= samples
    for i in range(len(built)):
        start = int(shuffled[i]) * seq_len
        text = stream[start : start + seq_len + extra].astype(np.int64)
        full = np.full(seq_len + 1, -1)
        full[: len(text)] = text
        sample = built[i]
        np.testing.assert_array_equal(sample["tokens"], np.maximum(full[:-1], 0))
        np.testing.assert_array_equal(sample["labels"], np.maximum(full[1:], 0))
        np.testing.assert_array_equal(sample["loss_mask"], full[1:] >= 0)
        np.testing.assert_array_equal(sample["position_ids"], np.arange(seq_len))


def test_masks_and_positions_at_eod(tmp_path: Path) -> None:
    source = dataset(tmp_path / "x", [30])
    options = SampleOptions(eod_id=4, eod_mask_loss=True, reset_position_ids=True)
    sample = GPTDataset(source, np.zeros(1, np.int32), 8, 1, 0, options)
    first = next(s for s in (sample[i] for i in range(3)) if s["tokens"][0] == 1)
    assert first["loss_mask"].tolist() == [1, 1, 1, 0, 1, 1, 1, 1]
    assert first["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_split_parsing() -> None:
    assert parse_split("949,50,1")[2] == (0.999, 1.0)
    assert parse_split("100") == [(0.0, 1.0), None, None]
    assert parse_split("1,0,1") == [(0.0, 0.5), None, (0.5, 1.0)]
    assert split_documents(5, (0.0, 0.5)).tolist() == [0, 1]  # round half to even
    for bad in ("", "a", "0,0,0", "1,2,3,4"):
        with pytest.raises(UserError):
            parse_split(bad)


def test_blend_parsing() -> None:
    assert parse_blend(["a", "b"]).weights is None
    assert parse_blend(["0.3", "a", 7, "b"]).weights == (0.3, 7.0)
    assert parse_blend(["a", "b", "c"]).prefixes == ("a", "b", "c")
    for bad in ([], ["-1", "a"], ["nan", "a"]):
        with pytest.raises(UserError):
            parse_blend(bad)


def test_too_little_data_is_said_so(tmp_path: Path) -> None:
    dataset(tmp_path / "x", [3, 4])
    with pytest.raises(UserError, match="fewer than one sample"):
        build_datasets([tmp_path / "x"], "100", 100, [None, None, None], 1)
    with pytest.raises(UserError, match="not one sample"):
        build_datasets([tmp_path / "x"], "999,1", 2, [None, None, None], 1)


def test_drawing_too_much_is_said_so(tmp_path: Path) -> None:
    dataset(tmp_path / "x", [300])
    dataset(tmp_path / "y", [40])
    paths = ["1", tmp_path / "x", "99", tmp_path / "y"]
    with pytest.raises(UserError, match="dataset 1"):
        build_datasets(paths, "1", 10, [None, 0, 0], 1)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=15).filter(lambda x: sum(x) > 12),
    seq_len=st.integers(1, 12),
    extra=st.booleans(),
    reset=st.booleans(),
)
def test_packed_samples_know_their_documents(
    lengths: list[int],
    seq_len: int,
    extra: bool,
    reset: bool,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    source = dataset(tmp_path_factory.mktemp("d") / "x", lengths)  # tokens 1, 2, 3, …
    options = SampleOptions(
        extra_token=extra, packed=True, drop_last=False, eod_id=5, reset_position_ids=reset
    )
    built = GPTDataset(source, np.arange(len(lengths), dtype=np.int32), seq_len, None, 3, options)
    document_of = np.repeat(np.arange(len(lengths)), lengths)
    for i in range(len(built)):
        sample = built[i]
        tokens, labels = sample["tokens"], sample["labels"]
        # 0 is padding here, and a part of its own.
        numbers = [-1 if t == 0 else int(document_of[t - 1]) for t in tokens]
        starts = [0, *(k for k in range(1, seq_len) if numbers[k] != numbers[k - 1]), seq_len]
        assert sample.get("cu_seqlens", np.zeros(0)).tolist() == starts
        position = 0
        for k in range(seq_len):
            position = 0 if k in starts else position
            assert sample["position_ids"][k] == position
            position = 0 if reset and tokens[k] == 5 else position + 1
            other = labels[k] == 0 or document_of[labels[k] - 1] != numbers[k]
            assert sample["loss_mask"][k] == (0 if other else 1)
