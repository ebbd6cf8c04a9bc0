"""The C++ encoder gives the ids of the sentencepiece library, for every model it accepts."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from fastllm_core import sentencepiece_encoder, sentencepiece_info

CORPUS = [
    "The quick brown fox jumps over the lazy dog; then it sleeps for 12345 hours.",
    "def encode(text: str) -> list[int]:  # naïve façade, déjà vu",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "いろはにほへと ちりぬるを 我が世誰ぞ 常ならむ。敏捷的棕色狐狸跳过懒狗",
    "if (a != b && c <= d) { return a->b[c] * 0xFF; }   /* ＡＢＣ ﬁ ½ ™ */",
    "नमस्ते दुनिया مرحبا بالعالم שלום עולם 😀👍🏽 e\u0301 <s> </s> <0x0A>",
]
# What makes models differ: each is a trainer's option away from the default.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"byte_fallback": True, "normalization_rule_name": "identity",
              "remove_extra_whitespaces": False, "split_digits": True},
    "default": {},
    "nfkc": {"normalization_rule_name": "nfkc", "byte_fallback": True},
    "nmt_nfkc_cf": {"normalization_rule_name": "nmt_nfkc_cf"},
    "no_prefix": {"add_dummy_prefix": False, "normalization_rule_name": "identity"},
    "user": {"user_defined_symbols": ["<sep>", "ab", "  ", "▁▁▁", "狐狸", "a"],
             "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    "spaces": {"allow_whitespace_only_pieces": True, "normalization_rule_name": "identity",
               "remove_extra_whitespaces": False, "split_by_whitespace": False},
}  # fmt: skip
# Mostly what the models know, so that merges happen; the rest from all of Unicode.
TEXTS = st.lists(
    st.sampled_from([c for line in CORPUS for c in line])
    | st.sampled_from(
        [" ", "  ", "▁", "\n", "\t", "\0", "\u3000", "\u200b", "\ufeff", "the ", "<sep>", "ab"]
    )
    | st.characters(exclude_categories=["Cs"])
).map("".join)


@functools.cache
def train(name: str) -> tuple[Any, Any]:
    """A small model: the library's processor and our encoder."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=256 + 330 if MODELS[name].get("byte_fallback") else 330,
        hard_vocab_limit=False,
        minloglevel=2,
        **MODELS[name],
    )
    processor: Any = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.getvalue())
    return processor, sentencepiece_encoder(model.getvalue())


def assert_same(processor: Any, encoder: Any, texts: list[str]) -> None:
    for text, ids in zip(texts, encoder.encode_batch(texts), strict=True):
        assert ids == processor.EncodeAsIds(text), repr(text)


@pytest.mark.parametrize("name", MODELS)
def test_corpus(name: str) -> None:
    processor, encoder = train(name)
    odd = [
        "",
        " ",
        "   ",
        "▁",
        "▁▁",
        " ▁ ",
        "\n",
        "a",
        "a ",
        " a",
        "  a  b  ",
        "é" * 70,
        "x" * 5000,
    ]
    joined = [" ".join(CORPUS) * 3, "\n".join(CORPUS), "".join(CORPUS)[::-1]]
    assert_same(processor, encoder, [*CORPUS, *odd, *joined])


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=150, deadline=None)
@given(texts=st.lists(TEXTS, min_size=1, max_size=5))
def test_fuzz(name: str, texts: list[str]) -> None:
    assert_same(*train(name), texts)


def test_a_line_of_ten_megabytes(mistral_model: Path) -> None:
    content = mistral_model.read_bytes()
    processor: Any = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    encoder = sentencepiece_encoder(content)
    text = ("".join(CORPUS) + "\n") * (10_000_000 // 700) + "a" * 300_000
    assert len(text.encode()) > 5_000_000
    assert encoder.encode(text).tolist() == processor.EncodeAsIds(text)


@settings(max_examples=200, deadline=None)
@given(text=TEXTS | st.text())
def test_fuzz_mistral(text: str, mistral_model: Path) -> None:
    processor, encoder = mistral(mistral_model)
    assert_same(processor, encoder, [text])


@functools.cache
def mistral(path: Path) -> tuple[Any, Any]:
    content = path.read_bytes()
    processor: Any = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    return processor, sentencepiece_encoder(content)


def test_other_algorithms_are_left_to_the_library() -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(CORPUS * 4), model_writer=model, model_type="unigram",
        vocab_size=250, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    assert sentencepiece_info(model.getvalue())["unsupported"] == "the model is not of type BPE"
