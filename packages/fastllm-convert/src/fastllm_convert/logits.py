"""``verify --logits``: run both models in transformers. The only module that needs torch."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

from fastllm_convert import __version__
from fastllm_convert.checkpoint import Checkpoint
from fastllm_convert.conversion import DEFAULT_SHARD_BYTES
from fastllm_convert.dtypes import F32
from fastllm_convert.engine.execute import default_threads, execute
from fastllm_convert.errors import UserError
from fastllm_convert.formats import hf_writer

_SEQUENCE = 32


def _forward(checkpoint: Checkpoint, folder: Path) -> Any:
    """Logits [1, 32, vocabulary] in fp32, on tokens 0, 7, 14, ... of the vocabulary."""
    import torch
    import transformers

    plan = hf_writer.plan(
        checkpoint, dtype=F32, shard_bytes=DEFAULT_SHARD_BYTES, version=__version__
    )
    execute(plan, folder, threads=default_threads(), check_crc=False, progress=lambda _: None)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
    )
    length = min(_SEQUENCE, checkpoint.spec.max_seq_len)
    ids = torch.arange(length).mul(7).remainder(checkpoint.spec.vocab).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(ids).logits


def largest_logit_difference(a: Checkpoint, b: Checkpoint) -> float:
    """Largest absolute difference. Raises ``UserError`` where torch or transformers is missing."""
    try:
        for name in ("torch", "transformers"):
            importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"--logits needs {error.name}", hint="pip install 'fastllm-convert[logits]'"
        ) from None
    with tempfile.TemporaryDirectory(prefix="fastllm-convert-") as scratch:
        first = _forward(a, Path(scratch) / "first")
        second = _forward(b, Path(scratch) / "second")
    if first.shape != second.shape:
        return float("inf")
    return float((first - second).abs().max())
