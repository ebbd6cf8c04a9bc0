"""Indices and samples are, value for value, those of Megatron-Core's datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastllm_data import BlendedDataset, GPTDataset, build_datasets
from fastllm_data.gpt_dataset import SampleOptions

pytestmark = pytest.mark.shared
SPLITS = ("train", "valid", "test")


def equal(ours: Any, theirs: Any, what: str) -> None:
    assert ours.dtype == theirs.dtype, what
    np.testing.assert_array_equal(ours, theirs, err_msg=what)


def load(golden: Path, name: str) -> Any:
    return np.load(golden / "index" / name)


def check_indices(dataset: GPTDataset, golden: Path, name: str) -> None:
    equal(dataset.document_index, load(golden, f"{name}_document_index.npy"), name)
    equal(dataset.sample_index, load(golden, f"{name}_sample_index.npy"), name)
    equal(dataset.shuffle_index, load(golden, f"{name}_shuffle_index.npy"), name)


@pytest.mark.parametrize("case", "ABCDEFGH")
def test_one_dataset(case: str, golden: Path) -> None:
    manifest = [e for e in json.loads((golden / "manifest.json").read_text()) if e["case"] == case]
    head, entries = manifest[0], manifest[1:]
    args = head["args"]
    options = SampleOptions(
        extra_token=args.get("add_extra_token_to_sequence", True),
        drop_last=args.get("drop_last_partial_validation_sequence", True),
        eod_id=2,
        eod_mask_loss=args.get("eml", False),
        reset_position_ids=args.get("rpi", False),
    )
    built = build_datasets(
        [golden / "bin" / head["prefix"]],
        args["split"],
        args["seq"],
        head["sizes"],
        args["seed"],
        options=options,
    )
    for entry in entries:
        dataset = built[SPLITS.index(entry["split"])]
        if entry.get("none"):
            assert dataset is None
            continue
        assert isinstance(dataset, GPTDataset)
        name = f"{case}_{entry['split']}"
        assert len(dataset) == entry["len"]
        assert dataset.plan.epochs == entry["num_epochs"]
        check_indices(dataset, golden, name)
        samples = load(golden, f"{name}_samples.npz")
        for i in entry["samples"]:
            for field, ours in dataset[i].items():
                equal(ours, samples[f"{field}_{i}"], f"{name} {field} {i}")


@pytest.mark.parametrize("case", ["W1", "W2", "W3", "W4"])
def test_blended(case: str, golden: Path) -> None:
    manifest = [e for e in json.loads((golden / "manifest.json").read_text()) if e["case"] == case]
    for entry in manifest:
        prefixes, weights = entry["blend"]
        paths: list[Any] = [golden / "bin" / p for p in prefixes]
        if weights:
            paths = [x for pair in zip(weights, paths, strict=True) for x in pair]
        built = build_datasets(paths, entry["split_str"], 64, entry["sizes"], 1234)
        dataset = built[SPLITS.index(entry["split"])]
        assert isinstance(dataset, BlendedDataset)
        name = f"{case}_{entry['split']}"
        assert len(dataset) == entry["len"]
        equal(dataset.dataset_index, load(golden, f"{name}_dataset_index.npy"), name)
        equal(dataset.dataset_sample_index, load(golden, f"{name}_dataset_sample_index.npy"), name)
        for j, part in enumerate(dataset.datasets):
            check_indices(part, golden, f"{name}_sub{j}")
        samples = load(golden, f"{name}_samples.npz")
        for key in samples.files:
            field, i = key.rsplit("_", 1)
            equal(dataset[int(i)][field], samples[key], f"{name} {key}")
