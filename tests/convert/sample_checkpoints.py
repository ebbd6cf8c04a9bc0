"""Small checkpoints made on the spot by torch and safetensors, and how two are compared."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from fastllm_convert.formats.hf_names import name_table
from fastllm_convert.layouts import Row
from fastllm_planner.arch import ArchSpec, iter_params, to_hf_config

Convert = Callable[..., subprocess.CompletedProcess[str]]
Tensors = dict[str, torch.Tensor]


def tiny_spec(**changes: object) -> ArchSpec:
    """A LLaMA of 2 layers with grouped queries; any field may be changed."""
    fields: dict[str, object] = {
        "family": "llama",
        "layers": 2,
        "hidden": 32,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 8,
        "ffn_hidden": 48,
        "vocab": 96,
        "max_seq_len": 64,
    }
    return ArchSpec(**{**fields, **changes})  # pyright: ignore[reportArgumentType]


def random_tensors(spec: ArchSpec, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensors:
    """Canonical name → values, for every tensor that has storage of its own."""
    generator = torch.Generator().manual_seed(seed)
    return {
        p.name: torch.randn(p.shape, generator=generator).to(dtype)
        for p in iter_params(spec)
        if p.tied_to is None
    }


def torch_join(row: Row, parts: list[torch.Tensor]) -> torch.Tensor:
    """What a Hugging Face row should hold, computed by torch (no code of the package)."""
    whole = torch.cat(parts, 0) if len(parts) > 1 else parts[0]
    return whole.t().contiguous() if row.how.kind.startswith("transposed") else whole


def hf_tensors(spec: ArchSpec, canonical: Tensors) -> Tensors:
    return {
        row.name: torch_join(row, [canonical[n] for n in row.canonical]) for row in name_table(spec)
    }


def write_hf(folder: Path, spec: ArchSpec, canonical: Tensors) -> Path:
    """A Hugging Face folder written by safetensors' own library."""
    folder.mkdir(parents=True)
    save_file(hf_tensors(spec, canonical), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(to_hf_config(spec)))
    return folder


def same(a: Tensors, b: Tensors) -> None:
    """Equal names, types and bits."""
    assert a.keys() == b.keys()
    for name, left in a.items():
        right = b[name]
        assert left.dtype == right.dtype, name
        assert left.shape == right.shape, name
        x, y = (t.contiguous().view(torch.uint8) if t.dim() else t for t in (left, right))
        assert torch.equal(x, y), name
