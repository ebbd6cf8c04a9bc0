"""The samples of a step depend on (seed, consumed samples) alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastllm_data import IndexedDatasetWriter
from fastllm_train.data import (
    DataConfig,
    EpochSamples,
    SyntheticSamples,
    open_training_data,
    rank_samples,
    read_step,
)
from fastllm_train.errors import UserError
from fastllm_train.layout import BatchConfig


@given(
    micro=st.integers(1, 4),
    dp=st.integers(1, 6),
    accumulation=st.integers(1, 4),
    consumed=st.integers(0, 10**6),
)
def test_ranks_together_take_the_step_s_samples(
    micro: int, dp: int, accumulation: int, consumed: int
) -> None:
    batch = BatchConfig(micro, micro * dp * accumulation, 8)
    parts = [rank_samples(consumed, batch, dp, rank) for rank in range(dp)]
    taken = sorted(i for rank in parts for part in rank for i in part)
    assert taken == list(range(consumed, consumed + batch.global_size))
    assert all(len(part) == micro for rank in parts for part in rank)


def test_the_same_tokens_for_any_data_parallel_size() -> None:
    source = SyntheticSamples(64, 16, 100, seed=3)
    batch = BatchConfig(2, 8, 16)

    def tokens(dp: int) -> set[bytes]:
        return {
            row.tobytes()
            for rank in range(dp)
            for micro in read_step(source, 8, batch, dp, rank, 100)
            for row in micro.tokens
        }

    assert tokens(1) == tokens(2) == tokens(4)
    assert len(tokens(1)) == 8


def test_synthetic_samples_do_not_change_and_can_be_learnt() -> None:
    source = SyntheticSamples(4, 32, 50, seed=3)
    one, again = source[2], source[2]
    assert np.array_equal(one["tokens"], again["tokens"])
    assert np.array_equal(one["tokens"][1:], one["labels"][:-1])
    assert len(set(zip(one["tokens"].tolist(), one["labels"].tolist(), strict=True))) == len(
        set(one["tokens"].tolist())
    )
    with pytest.raises(IndexError):
        source[-1]


def test_a_token_outside_the_vocabulary_is_an_error() -> None:
    source = SyntheticSamples(8, 16, 100, seed=3)
    with pytest.raises(UserError, match="vocabulary has 50 entries"):
        read_step(source, 0, BatchConfig(8, 8, 16), 1, 0, 50)


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """Nine documents of 10 to 18 tokens; every token is its own number, document*100 + position."""
    prefix = tmp_path / "corpus_text_document"
    with IndexedDatasetWriter(prefix, "uint16") as writer:
        for document in range(9):
            writer.add(np.arange(10 + document) + 100 * document)
            writer.end_document()
    return str(prefix)


def test_an_epoch_covers_the_data_and_does_not_depend_on_the_run_s_length(corpus: str) -> None:
    config = DataConfig(paths=(corpus,), split="1", seed=5)
    batch = BatchConfig(1, 2, 8)
    short = open_training_data(config, batch, steps=2, vocab=1000)
    longer = open_training_data(config, batch, steps=40, vocab=1000)
    assert isinstance(longer, EpochSamples)
    per_epoch = longer.per_epoch
    assert per_epoch == (sum(range(10, 19)) - 1) // 8
    for index in (0, 3, per_epoch, 2 * per_epoch + 1, 1):
        assert np.array_equal(short[index]["tokens"], longer[index]["tokens"])
    first = [longer[i]["tokens"].tobytes() for i in range(per_epoch)]
    second = [longer[per_epoch + i]["tokens"].tobytes() for i in range(per_epoch)]
    assert len(set(first)) == per_epoch
    assert first != second
    sample = longer[0]
    assert np.array_equal(sample["tokens"][1:], sample["labels"][:-1])


def test_a_second_start_takes_the_order_from_the_cache(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = DataConfig(paths=(corpus,), split="1", seed=5)
    cached = replace(plain, cache_dir=str(tmp_path / "cache"))
    batch = BatchConfig(1, 2, 8)

    def tokens(config: DataConfig) -> list[bytes]:
        source = open_training_data(config, batch, steps=12, vocab=1000)
        return [source[i]["tokens"].tobytes() for i in range(24)]

    expected = tokens(plain)
    assert tokens(cached) == expected

    def build(**_: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr("fastllm_data.gpt_dataset.gpt_indices", build)
    assert tokens(cached) == expected
    with pytest.raises(AssertionError, match="built again"):
        tokens(plain)


def test_missing_data_is_one_clear_error(tmp_path: Path) -> None:
    config = DataConfig(paths=(str(tmp_path / "absent"),))
    with pytest.raises(UserError, match="absent"):
        open_training_data(config, BatchConfig(1, 1, 8), steps=1, vocab=10)


def test_a_split_without_training_documents_is_an_error(corpus: str) -> None:
    config = DataConfig(paths=(corpus,), split="0,1")
    with pytest.raises(UserError, match="no documents"):
        open_training_data(config, BatchConfig(1, 1, 8), steps=1, vocab=10)
