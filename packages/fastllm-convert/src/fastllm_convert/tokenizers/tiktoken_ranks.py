"""LLaMA 3's tokenizer, a file of byte-pair ranks (base64, number), as ``tokenizer.json``.

The 256 special tokens are not in the file; their names are Meta's (llama-models, models/llama3/
tokenizer.py), as Hugging Face publishes them. Byte-level text uses GPT-2's printable stand-ins for
bytes, which is what the tokenizers library expects.
"""

from __future__ import annotations

import base64
import binascii
from functools import cache
from typing import Any

_SPECIAL = 256
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMED_3 = {6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
_NAMED_31 = {**_NAMED_3, 4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}


def parse(data: bytes) -> list[bytes] | None:
    """Tokens in rank order; None when this is not a rank file."""
    tokens: list[bytes] = []
    for number, line in enumerate(data.split(b"\n")):
        if not line:
            continue
        encoded, _, rank = line.partition(b" ")
        try:
            tokens.append(base64.b64decode(encoded, validate=True))
            if int(rank) != len(tokens) - 1:
                return None
        except (ValueError, binascii.Error):
            return None
        if number > 2_000_000:
            return None
    single = {t for t in tokens if len(t) == 1}
    return tokens if len(single) == 256 and len(set(tokens)) == len(tokens) else None


@cache
def byte_letters() -> list[str]:
    """GPT-2's bytes_to_unicode: printable bytes stand for themselves, the rest from U+0100 on."""
    kept = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    return [chr(b) if b in kept else chr(next(spare)) for b in range(256)]


def _text(token: bytes) -> str:
    letters = byte_letters()
    return "".join(letters[b] for b in token)


def special_names(*, scaled_rope: bool) -> list[str]:
    """LLaMA 3's names, or those of 3.1 and later (which scale RoPE)."""
    named = _NAMED_31 if scaled_rope else _NAMED_3
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    reserved = 0
    for index in range(2, _SPECIAL):
        if index in named:
            names.append(f"<|{named[index]}|>")
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def merges(tokens: list[bytes]) -> list[list[str]]:
    """Every split of a token into two tokens, by the rank of the whole, then of the parts."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found: list[tuple[int, int, int]] = []
    for rank, token in enumerate(tokens):
        for cut in range(1, len(token)):
            left, right = ranks.get(token[:cut]), ranks.get(token[cut:])
            if left is not None and right is not None:
                found.append((rank, left, right))
    return [[_text(tokens[left]), _text(tokens[right])] for _, left, right in sorted(found)]


def build(tokens: list[bytes], specials: list[str]) -> dict[str, Any]:
    """The object to write as ``tokenizer.json``."""
    bos = specials[0]
    begin: dict[str, Any] = {"SpecialToken": {"id": bos, "type_id": 0}}
    first: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    again: dict[str, Any] = {"SpecialToken": {"id": bos, "type_id": 1}}
    second: dict[str, Any] = {"Sequence": {"id": "B", "type_id": 1}}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    template = {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, again, second],
        "special_tokens": {bos: {"id": bos, "ids": [len(tokens)], "tokens": [bos]}},
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": len(tokens) + index,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index, name in enumerate(specials)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {**byte_level, "add_prefix_space": False, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "Sequence",
            "processors": [
                {**byte_level, "add_prefix_space": True, "trim_offsets": False},
                template,
            ],
        },
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {_text(token): rank for rank, token in enumerate(tokens)},
            "merges": merges(tokens),
        },
    }


def tokenizer_config(specials: list[str], *, max_length: int) -> dict[str, Any]:
    """``tokenizer_config.json`` for ``build``'s file."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": specials[0],
        "eos_token": specials[1],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }
