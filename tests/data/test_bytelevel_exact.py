"""The byte-level encoder and its scanners give what the reference libraries give."""

from __future__ import annotations

import base64
import functools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from fastllm_core import InputError, bytelevel_encoder
from fastllm_core._core import pretokenize
from fastllm_data import UserError
from fastllm_data.tiktoken_file import (
    CL100K_PATTERN,
    FAMILIES,
    O200K_PATTERN,
    QWEN_PATTERN,
    Family,
    RankFile,
    parse_rank_file,
    parse_tekken,
)
from fastllm_data.tokenizer import load_tokenizer
from fastllm_data.tokenizer_json import (
    GPT2_PATTERN,
    all_token_bytes,
    gpt2_as_tokenizer_json,
    gpt2_library,
    token_bytes,
)

PATTERNS = {
    "gpt2": GPT2_PATTERN,
    "cl100k": CL100K_PATTERN,
    "qwen": QWEN_PATTERN,
    "o200k": O200K_PATTERN,
    "tekken": O200K_PATTERN.replace("(?i:'s|'t|'re|'ve|'m|'ll|'d)?", "").replace("{1,3}", ""),
}
ALPHABET = [
    *"aZbstSdD1234 \n\r\t/.,'é\u0301ßǅªʰ中の\u3000\u00a0\u2028\u0085½Ⅷ😀\u017f\u212a",
    *("'s", "'LL", "'re", "'ſ", "  ", " \n", "\r\n", "<|endoftext|>", "<|end", "the ", "ing"),
]
TEXTS = st.lists(
    st.sampled_from(ALPHABET) | st.characters(exclude_categories=["Cs"]), max_size=30
).map("".join)
CORPUS = [
    "The quick brown fox jumps over 12345 lazy dogs; it's what they'll do, isn't it?",
    "def f(x):\n    return x['key'] + 1\n\n\n",
    "Съешь же ещё этих мягких французских булок 中文字符 かな 😀👍🏽 naïve Café",
] * 6


def split_by(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def test_bytes_of_all_tokens_at_once() -> None:
    characters = [chr(code) for code in range(0x200)]
    assert [all_token_bytes([c])[0] for c in characters] == [token_bytes(c) for c in characters]
    for tokens in ([], ["ab", "Ġé", "\u0120", ""], ["a", "日", "b"]):
        assert all_token_bytes(tokens) == [token_bytes(token) for token in tokens]


def test_gpt2_files_give_the_library_the_same_as_through_json() -> None:
    vocab = {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}
    parsed = gpt2_as_tokenizer_json(vocab, "#version: 0.2\na b\n")
    direct = json.loads(gpt2_library(parsed).to_str())
    through = json.loads(Tokenizer.from_str(json.dumps(parsed)).to_str())
    del direct["decoder"], through["decoder"]  # one option of it differs, which it does not use
    assert direct == through


@pytest.mark.parametrize("name", ["gpt2", "o200k"])
def test_scanner_on_every_code_point(name: str) -> None:
    """Each code point between letters, digits, spaces and after an apostrophe.

    Of planes 4 to 16 only 14 has characters that are assigned and not private. The two patterns use
    every class that the others do.
    """
    pattern = PATTERNS[name]
    reference = split_by(pattern)
    block = 64
    for first in [*range(0, 0x40000, block), *range(0xE0000, 0xE1000, block)]:
        if 0xD800 <= first < 0xE000:
            continue
        characters = [chr(cp) for cp in range(first, first + block)]
        text = "\n".join(f"a{c}b 1{c}2 {c}. '{c} A{c}{c}Z" for c in characters)
        assert pretokenize(pattern, text) == [p for p, _ in reference.pre_tokenize_str(text)], hex(
            first
        )


@pytest.mark.parametrize("name", PATTERNS)
def test_scanner_on_random_text(name: str) -> None:
    rng = random.Random(0)
    reference = split_by(PATTERNS[name])
    for _ in range(4000):
        text = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 14)))
        want = [p for p, _ in reference.pre_tokenize_str(text)]
        assert pretokenize(PATTERNS[name], text) == want, repr(text)


def test_unknown_expressions_are_refused() -> None:
    for pattern in ("", r"\w+", GPT2_PATTERN + "|x", CL100K_PATTERN.replace("{1,3}", "{1,2}")):
        with pytest.raises(InputError, match="expression"):
            pretokenize(pattern, "text")


@functools.cache
def trained(name: str, ignore_merges: bool) -> str:
    """A small tokenizer.json with this pattern."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if name == "gpt2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [split_by(PATTERNS[name]), byte_level]
        )  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>", "<|end"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer.to_str()


@pytest.mark.parametrize("parse_special", [None, False])
@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("name", PATTERNS)
def test_tokenizer_json(
    name: str,
    ignore_merges: bool,
    parse_special: bool | None,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    path = tmp_path_factory.mktemp("t") / "tokenizer.json"
    path.write_text(trained(name, ignore_merges), encoding="utf-8")
    loaded = load_tokenizer(path, parse_special=parse_special)
    assert loaded.load_fast is not None, loaded.no_fast_reason
    encoder, reference = loaded.load_fast(), loaded.reference

    @settings(max_examples=60, deadline=None)
    @given(texts=st.lists(TEXTS, min_size=1, max_size=5))
    def same(texts: list[str]) -> None:
        got = encoder.encode_batch(texts)
        assert got == reference.encode(texts)

    same()
    long = ["a" * 3000 + "\n" * 3000 + "1" * 100, " ".join(CORPUS), ""]
    assert encoder.encode_batch(long) == reference.encode(long)
    special = encoder.encode("x<|endoftext|>y").tolist()
    assert (loaded.eod_id in special) == (parse_special is None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "NFC"}}, "normalizes"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "not ByteLevel"),
        ({"pre_tokenizer": None}, "no pre-tokenizer"),
        ({"model": {"type": "WordPiece", "vocab": {}}}, "WordPiece"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}, "prefix space"),
    ],
)
def test_what_the_encoder_cannot_do_is_left_to_the_library(
    change: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    parsed = json.loads(trained("gpt2", False)) | change
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(parsed), encoding="utf-8")
    loaded = load_tokenizer(path)
    assert loaded.load_fast is None
    assert reason in loaded.no_fast_reason


def ranks_of(text: str) -> list[bytes]:
    """A tiny rank file's tokens: all bytes, then all substrings of two to five bytes of a text."""
    data = text.encode()
    parts = {data[i : i + n] for n in range(2, 6) for i in range(len(data) - n + 1)}
    return [bytes([b]) for b in range(256)] + sorted(parts, key=lambda p: (len(p), p))


@pytest.mark.parametrize("name", PATTERNS)
def test_rank_files(name: str) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    tokens = ranks_of("the naïve quick brown fox isn't 123 中文")
    file = RankFile(Family(name, PATTERNS[name], len(tokens), 0), tokens, first_id=3)
    encoder = file.fast()
    reference = file.reference()
    assert isinstance(reference, tiktoken.Encoding)

    @settings(max_examples=100, deadline=None)
    @given(text=TEXTS)
    def same(text: str) -> None:
        want = [i + 3 for i in reference.encode_ordinary(text)]
        assert encoder.encode(text).tolist() == want

    same()


def test_damaged_rank_files_are_refused() -> None:
    lines = [base64.b64encode(bytes([b])) + b" %d" % b for b in range(256)]
    with pytest.raises(UserError, match="256 ranks"):
        parse_rank_file("f", b"\n".join(lines))
    with pytest.raises(UserError, match="f:4: rank 9, expected 3"):
        parse_rank_file("f", b"\n".join([*lines[:3], b"Aw== 9"]))
    with pytest.raises(UserError, match="f:2: not"):
        parse_rank_file("f", lines[0] + b"\n???? 1")
    with pytest.raises(UserError, match="not a tekken file"):
        parse_tekken("f", {"config": {}, "vocab": []})
    assert all(family.eod_id < family.vocab_size for family in FAMILIES.values())


def test_incomplete_models_are_refused() -> None:
    tokens = [bytes([b]) for b in range(256)]
    rest: dict[str, Any] = {"ignore_merges": False, "pattern": GPT2_PATTERN, "special": []}
    with pytest.raises(InputError, match="a byte has no token"):
        bytelevel_encoder(tokens=tokens[:255], merges=[], **rest)
    with pytest.raises(InputError, match="outside the vocabulary"):
        bytelevel_encoder(tokens=tokens, merges=[(1, 256)], **rest)
    with pytest.raises(InputError, match="no token"):
        bytelevel_encoder(tokens=tokens, merges=[(97, 98)], **rest)
