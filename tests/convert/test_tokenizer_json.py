"""tokenizer.json made from a SentencePiece model encodes exactly as SentencePiece does."""

from __future__ import annotations

import io
import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sample_checkpoints import Convert, random_tensors, tiny_spec, write_hf

from fastllm_convert.errors import UserError
from fastllm_convert.tokenizers import sentencepiece_model, tokenizer_json

DOCUMENTS = [
    line
    for file in (json.__file__, random.__file__, shutil.__file__)
    for line in Path(file).read_text().splitlines()
    if line.strip()
] + ["日本語テキスト テスト", "naïve café", "  two  spaces", "ﬁ ①"] * 3

EDGES = ["", " ", "  ", "Hello  world", "   leading", "trailing   ", "a\tb\n\nc", "日本語テキスト"]
EDGES += [
    "e\u0301 é",
    "\u2581literal",
    "x\u2581\u2581y",
    "😀👩‍👧",
    "\u00a0nbsp\u3000x",
    "\x00\x01\x7f",
]
EDGES += ["x" + " " * n + "y" for n in range(20)] + ["-" * n for n in range(20)]
EDGES += ["def f(x):\n    return x\n\n\n        if x:  # c\n", "\r\n\r\n", "1234567890 3.14"]


def train(**options: object) -> bytes:
    out = io.BytesIO()
    settings_ = {"vocab_size": 600, "model_type": "bpe", "minloglevel": 2, **options}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(DOCUMENTS), model_writer=out, **settings_
    )
    return out.getvalue()


PLAIN = {"byte_fallback": True, "normalization_rule_name": "identity"}
PLAIN |= {"remove_extra_whitespaces": False}
VARIANTS = {
    "llama": {**PLAIN, "split_digits": True, "allow_whitespace_only_pieces": True},
    "defaults": {},
    "no prefix": {**PLAIN, "add_dummy_prefix": False, "normalization_rule_name": "nfkc"},
    "bytes and nmt": {"byte_fallback": True, "character_coverage": 0.99},
    "unigram": {"model_type": "unigram"},
}


def pair(data: bytes) -> tuple[sentencepiece.SentencePieceProcessor, tokenizers.Tokenizer]:
    model = sentencepiece_model.parse(data)
    built = json.dumps(tokenizer_json.build(model, add_bos=False))
    return (
        sentencepiece.SentencePieceProcessor(model_proto=data),
        tokenizers.Tokenizer.from_str(built),
    )


@pytest.fixture(scope="module")
def llama_like() -> bytes:
    return train(**VARIANTS["llama"])


@pytest.mark.parametrize("variant", VARIANTS)
def test_encodes_and_decodes_alike(variant: str) -> None:
    ours = pair(train(**VARIANTS[variant]))
    text = Path(tokenizers.__file__).read_text() + Path(shutil.__file__).read_text()
    texts = EDGES + [text[i : i + 300] for i in range(0, 30_000, 300)]
    for sample in texts:
        expected = ours[0].encode(sample)
        found = ours[1].encode(sample, add_special_tokens=False).ids
        assert found == expected, (variant, sample)
        if ours[0].unk_id() not in expected:
            decoded = ours[1].decode(found, skip_special_tokens=False)
            assert decoded == ours[0].decode(expected), (variant, sample)


def test_random_text(llama_like: bytes) -> None:
    reference, ours = pair(llama_like)

    @settings(max_examples=300, deadline=None)
    @given(st.text(alphabet="ab \n\t.é日\u2581<>0x9Z=_-", max_size=40))
    def check(text: str) -> None:
        assert ours.encode(text, add_special_tokens=False).ids == reference.encode(text)

    check()


def test_whitespace_pieces_of_one_low_score_merge_from_the_left() -> None:
    """LLaMA's and Mistral's models: low ids, lowest scores. Ordering merges by id is wrong."""
    space = "\u2581"
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{i:02X}>", 0.0, 6) for i in range(256)]
    pieces += [(space * n, -1e9, 1) for n in (2, 4, 3, 8)]
    pieces += [(space + "w", -5.0, 1), (space + "wo", -6.0, 1)]
    pieces += [(c, -1e9 - 1, 1) for c in (space, "w", "o", "x")]
    data = b"".join(field(1, piece(*p)) for p in pieces)
    data += field(2, varint(3, 2) + varint(35, 1))
    data += field(3, varint(3, 1) + varint(4, 0))
    reference, ours = pair(data)
    for n in range(30):
        for text in ("x" + " " * n + "wox", " " * n, "wo" + " " * n + "wo"):
            assert ours.encode(text, add_special_tokens=False).ids == reference.encode(text), text


def number(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def varint(key: int, value: int) -> bytes:
    return number(key << 3) + number(value)


def field(key: int, content: bytes) -> bytes:
    return number(key << 3 | 2) + number(len(content)) + content


def piece(text: str, score: float, kind: int) -> bytes:
    import struct

    return field(1, text.encode()) + number(2 << 3 | 5) + struct.pack("<f", score) + varint(3, kind)


def test_auto_tokenizer_loads_it(tmp_path: Path, convert: Convert, llama_like: bytes) -> None:
    transformers = pytest.importorskip("transformers")
    spec = tiny_spec(vocab=640)
    source = write_hf(tmp_path / "src", spec, random_tensors(spec, torch.bfloat16))
    (source / "tokenizer.model").write_bytes(llama_like)
    convert("run", source, tmp_path / "dst", "--to", "hf")
    assert (tmp_path / "dst" / "tokenizer.model").read_bytes() == llama_like
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "dst")
    reference = sentencepiece.SentencePieceProcessor(model_proto=llama_like)
    for text in EDGES:
        assert loaded(text, add_special_tokens=False)["input_ids"] == reference.encode(text)
    assert loaded.bos_token_id == reference.bos_id()
    assert loaded.eos_token_id == reference.eos_id()
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["eos_token_id"] == reference.eos_id()


@pytest.mark.shared
def test_llama3_ranks_give_transformers_tokenizer(
    golden: Path, tmp_path: Path, convert: Convert
) -> None:
    """tokenizer.json from Meta's rank file, against what transformers' converter made of it."""
    case = golden / "llama3_gqa_mp1"
    convert("run", case / "meta", tmp_path / "hf", "--to", "hf")
    files = [folder / "tokenizer.json" for folder in (tmp_path / "hf", case / "hf")]
    ours, theirs = (json.loads(file.read_text()) for file in files)
    assert ours["model"]["vocab"] == theirs["model"]["vocab"]
    assert ours["model"]["merges"] == theirs["model"]["merges"]
    assert ours["added_tokens"] == theirs["added_tokens"]
    a, b = (tokenizers.Tokenizer.from_file(str(file)) for file in files)
    text = Path(shutil.__file__).read_text()
    for sample in [*EDGES, "<|eot_id|>x", *(text[i : i + 200] for i in range(0, 10_000, 200))]:
        assert a.encode(sample).ids == b.encode(sample).ids, sample
        assert a.decode(a.encode(sample).ids) == b.decode(b.encode(sample).ids)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"]) == (384, 385)
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert loaded("def f(x)")["input_ids"] == a.encode("def f(x)").ids


def test_bos_is_added_where_asked(llama_like: bytes) -> None:
    model = sentencepiece_model.parse(llama_like)
    built = tokenizers.Tokenizer.from_str(json.dumps(tokenizer_json.build(model, add_bos=True)))
    plain = built.encode("x", add_special_tokens=False).ids
    assert built.encode("x").ids == [1, *plain]
    assert built.encode("x", "x").ids == [1, *plain, 1, *plain]


@given(st.binary(max_size=80))
def test_any_bytes_are_a_model_or_an_error(data: bytes) -> None:
    import struct

    try:
        sentencepiece_model.parse(data)
    except (ValueError, struct.error):
        return


def test_truncated_model_is_refused(tmp_path: Path, llama_like: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(llama_like[:-3])
    with pytest.raises(UserError, match="not a SentencePiece model"):
        sentencepiece_model.read(path)
