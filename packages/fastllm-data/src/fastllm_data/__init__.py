"""JSONL to Megatron-compatible datasets through a native builder, and the datasets for training.

The names below load on first use, so that ``import fastllm_data`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastllm_data.errors import UserError

if TYPE_CHECKING:
    from fastllm_data.blend import BlendedDataset
    from fastllm_data.build import build_datasets
    from fastllm_data.chat_dataset import ChatDataset, PackedSample
    from fastllm_data.gpt_dataset import GPTDataset, Sample
    from fastllm_data.indexed_dataset import IndexedDataset, IndexedDatasetWriter

__version__ = "0.1.0"

__all__ = [
    "BlendedDataset",
    "ChatDataset",
    "GPTDataset",
    "IndexedDataset",
    "IndexedDatasetWriter",
    "PackedSample",
    "Sample",
    "UserError",
    "__version__",
    "build_datasets",
]

_HOME = {
    "BlendedDataset": "blend",
    "ChatDataset": "chat_dataset",
    "GPTDataset": "gpt_dataset",
    "IndexedDataset": "indexed_dataset",
    "IndexedDatasetWriter": "indexed_dataset",
    "PackedSample": "chat_dataset",
    "Sample": "gpt_dataset",
    "build_datasets": "build",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastllm_data.{_HOME[name]}"), name)
