"""Indices kept on disk: found again, never half-written, built once by many ranks; pickling."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm_data import BlendedDataset, GPTDataset, IndexedDataset, UserError, build_datasets
from fastllm_data import index_cache as cache
from fastllm_data.gpt_dataset import SampleOptions
from fastllm_data.indexed_dataset import IndexedDatasetWriter


def write(prefix: Path, seed: int, documents: int = 40) -> Path:
    rng = np.random.RandomState(seed)
    with IndexedDatasetWriter(prefix) as writer:
        for _ in range(documents):
            writer.add(rng.randint(0, 60000, rng.randint(0, 50)))
            writer.end_document()
    return prefix


def train(prefix: Path, cache_dir: Path | None, **options: Any) -> GPTDataset:
    made = build_datasets(
        [prefix], "90,10", 16, [200, 0, 0], 5, cache_dir, SampleOptions(**options)
    )[0]
    assert isinstance(made, GPTDataset)
    return made


def items(dataset: Any) -> list[list[Any]]:
    return [[value.tolist() for value in dataset[i].values()] for i in range(len(dataset))]


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def never() -> cache.Arrays:
    raise AssertionError("built although it is cached")


def test_the_second_run_maps_what_the_first_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, folder = write(tmp_path / "x", 1), tmp_path / "a" / "cache"
    plain, first = train(prefix, None), train(prefix, folder)
    assert len(entries(folder)) == 1
    monkeypatch.setattr("fastllm_data.gpt_dataset.gpt_indices", never)
    again = train(prefix, folder)
    assert items(plain) == items(first) == items(again)
    for name in ("document_index", "sample_index", "shuffle_index"):
        assert getattr(plain, name).dtype == getattr(again, name).dtype
        assert not getattr(again, name).flags.writeable


def test_other_contents_and_settings_have_other_entries(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    train(write(tmp_path / "x", 1), folder)
    # The same name and number of documents, other lengths: Megatron would use the old indices.
    dataset = train(write(tmp_path / "x", 2), folder)
    assert items(dataset) == items(train(tmp_path / "x", None))
    train(tmp_path / "x", folder, extra_token=False)
    build_datasets([tmp_path / "x"], "90,10", 16, [200, 0, 0], 6, folder)
    build_datasets([tmp_path / "x"], "80,20", 16, [200, 0, 0], 5, folder)
    build_datasets([tmp_path / "x"], "90,10", 8, [200, 0, 0], 5, folder)
    assert len(entries(folder)) == 6
    train(write(tmp_path / "copy", 2), folder)  # equal contents share an entry
    assert len(entries(folder)) == 6


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "description", "empty"])
def test_a_damaged_entry_is_built_again(tmp_path: Path, damage: str) -> None:
    prefix, folder = write(tmp_path / "x", 1), tmp_path / "cache"
    want = items(train(prefix, folder))
    entry = folder / entries(folder)[0]
    file = entry / "shuffle_index.npy"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[-3] ^= 4
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "missing":
        file.unlink()
    elif damage == "description":
        (entry / cache.DESCRIPTION).write_text("{")
    else:
        file.write_bytes(b"")
    assert items(train(prefix, folder)) == want
    assert cache._load(entry) is not None
    assert entries(folder) == [entry.name]


def test_blends_are_cached_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = ["0.3", write(tmp_path / "x", 1), "0.7", write(tmp_path / "y", 2)]

    def made(folder: Path | None) -> list[BlendedDataset]:
        weighted = build_datasets(paths, "1", 16, [100, 0, 0], 5, folder)[0]
        exhaustive = build_datasets(paths[1::2], "1", 16, [None, 0, 0], 5, folder)[0]
        both = [weighted, exhaustive]
        assert all(isinstance(dataset, BlendedDataset) for dataset in both)
        return both  # pyright: ignore[reportReturnType]

    want = [items(dataset) for dataset in made(None)]
    folder = tmp_path / "cache"
    assert [items(dataset) for dataset in made(folder)] == want
    for name in ("blend", "exhaustive_blend"):
        monkeypatch.setattr(f"fastllm_data.blend.{name}", never)
    assert [items(dataset) for dataset in made(folder)] == want
    assert [items(pickle.loads(pickle.dumps(dataset))) for dataset in made(folder)] == want


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", 1)
    (tmp_path / "cache").mkdir(mode=0o500)
    with pytest.warns(RuntimeWarning, match="not cached"):
        train(prefix, tmp_path / "cache")


def test_a_file_in_the_folder_s_place(tmp_path: Path) -> None:
    prefix = write(tmp_path / "x", 1)
    (tmp_path / "cache").write_text("")
    with pytest.warns(RuntimeWarning, match="not cached"):
        dataset = train(prefix, tmp_path / "cache")
    assert items(dataset) == items(train(prefix, None))


def _build_slowly(folder: Path, log: Path, value: int) -> int:
    def build() -> cache.Arrays:
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return {"a": np.full(1000, value)}

    return int(cache.load_or_build(folder, {"value": value}, build)["a"].sum())


def test_many_processes_build_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with multiprocessing.get_context("fork").Pool(6) as pool:
        sums = pool.starmap(_build_slowly, [(tmp_path / "cache", log, 7)] * 12)
    assert sums == [7000] * 12
    assert len(log.read_text().splitlines()) == 1
    assert len(entries(tmp_path / "cache")) == 1


def test_the_lock_of_a_dead_process_is_broken(tmp_path: Path) -> None:
    def die() -> None:
        with cache._locked(tmp_path / "k.lock", lambda: False):
            os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert (tmp_path / "k.lock").exists()
    with cache._locked(tmp_path / "k.lock", lambda: False) as mine:
        assert mine
    assert entries(tmp_path) == []


def test_the_lock_of_a_silent_host_is_broken_and_a_renewed_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "STALE_SECONDS", 0.4)
    lock = tmp_path / "k.lock"
    lock.write_text("elsewhere 1 abc")
    with cache._locked(lock, lambda: False) as mine:
        assert mine
    lock.write_text("elsewhere 1 abc")
    stop = threading.Event()

    def renew() -> None:
        for k in range(1, 21):  # for 1 s
            os.utime(lock, ns=(k, k))
            if stop.wait(0.05):
                return

    thread = threading.Thread(target=renew)
    thread.start()
    started = time.monotonic()
    with cache._locked(lock, lambda: False):
        assert time.monotonic() - started > 1.0
    stop.set()
    thread.join()


def test_a_publisher_that_comes_second_keeps_the_first(tmp_path: Path) -> None:
    entry = tmp_path / "k"
    cache._publish(tmp_path, entry, "{}", {"a": np.arange(3)})
    cache._publish(tmp_path, entry, "{}", {"a": np.arange(3)})
    assert entries(tmp_path) == ["k"]
    loaded = cache._load(entry)
    assert loaded is not None
    assert loaded["a"].tolist() == [0, 1, 2]


def _read(dataset: Any, numbers: list[int]) -> list[list[int]]:
    return [dataset[i]["tokens"].tolist() for i in numbers]


@pytest.mark.parametrize("cached", [False, True])
def test_datasets_cross_to_spawned_workers(tmp_path: Path, cached: bool) -> None:
    folder = tmp_path / "cache" if cached else None
    dataset = train(write(tmp_path / "x", 1), folder)
    if cached:
        assert len(pickle.dumps(dataset)) < 2000
    numbers = list(range(20))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        got = pool.apply(_read, (dataset, numbers))
    assert got == _read(dataset, numbers)


def test_a_changed_file_is_not_read_by_a_worker(tmp_path: Path) -> None:
    prefix, folder = write(tmp_path / "x", 1), tmp_path / "cache"
    pickled = pickle.dumps(train(prefix, folder))
    indexed = pickle.dumps(IndexedDataset(prefix))
    assert pickle.loads(indexed).tokens.tolist() == IndexedDataset(prefix).tokens.tolist()
    write(prefix, 2)
    for content in (pickled, indexed):
        with pytest.raises(UserError, match="have changed"):
            pickle.loads(content)


def test_a_worker_says_when_the_cache_is_gone(tmp_path: Path) -> None:
    pickled = pickle.dumps(train(write(tmp_path / "x", 1), tmp_path / "cache"))
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="gone or damaged"):
        pickle.loads(pickled)
