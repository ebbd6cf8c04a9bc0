"""Hugging Face ``tokenizer.json`` and GPT-2's ``vocab.json`` + ``merges.txt``: byte-level BPE.

The fast encoder takes a file whose parts are all among those checked here, and refuses any other
with the reason; then the ``tokenizers`` library encodes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise
from typing import Any

from fastllm_core import Encoder, InputError, bytelevel_encoder

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Unsupported(Exception):
    """Why the fast encoder does not take a file."""


@cache
def byte_of_character() -> dict[str, int]:
    """Which byte each character of a byte-level vocabulary stands for (OpenAI's GPT-2 encoder.py).

    Printable Latin-1 characters stand for themselves, the others for U+0100 onwards.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def token_bytes(token: str) -> bytes | None:
    """The bytes that a byte-level token stands for; None if it is not written that way."""
    try:
        return bytes(map(byte_of_character().__getitem__, token))
    except KeyError:
        return None


def all_token_bytes(tokens: list[str]) -> list[bytes | None]:
    """``token_bytes`` of each; all at once, as a character stands for one byte."""
    table = {ord(character): byte for character, byte in byte_of_character().items()}
    # What stands for itself and is no character of such a vocabulary must not pass for its byte.
    table |= {code: 0x110000 - 1 for code in range(256) if code not in table}
    try:
        joined = "".join(tokens).translate(table).encode("latin-1")
    except UnicodeEncodeError:
        return [token_bytes(token) for token in tokens]
    ends = list(accumulate(map(len, tokens), initial=0))
    return [joined[begin:end] for begin, end in pairwise(ends)]


@dataclass(frozen=True)
class ByteLevelParts:
    """What the fast encoder is made of."""

    tokens: list[bytes]
    merges: list[tuple[int, int]]
    ignore_merges: bool
    pattern: str
    special: list[tuple[str, int]]

    def encoder(self) -> Encoder:
        return bytelevel_encoder(
            tokens=self.tokens,
            merges=self.merges,
            ignore_merges=self.ignore_merges,
            pattern=self.pattern,
            special=self.special,
        )


def byte_level_parts(parsed: dict[str, Any], parse_special: bool = True) -> ByteLevelParts:
    """Take a parsed tokenizer.json apart. Raises Unsupported.

    parse_special False: special tokens in text are ordinary text (other added tokens are not).
    """
    model = parsed["model"]
    _check_model(model)
    if parsed.get("normalizer") is not None:
        raise Unsupported("it normalizes text")
    pattern = _pattern(parsed.get("pre_tokenizer"))
    vocab: dict[str, int] = model["vocab"]
    added_tokens: list[dict[str, Any]] = parsed.get("added_tokens") or []
    special = _added_tokens(
        [token for token in added_tokens if parse_special or not token.get("special")]
    )
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    try:
        merges = [(vocab[left], vocab[right]) for left, right in pairs]
    except KeyError as error:
        raise Unsupported("a merge names an unknown token") from error
    tokens = [b""] * (max(vocab.values(), default=-1) + 1)
    added = {str(token["content"]) for token in added_tokens}
    for (text, token), content in zip(vocab.items(), all_token_bytes(list(vocab)), strict=True):
        if content is None and text not in added:
            raise Unsupported(f"token {text!r} is not written in bytes")
        tokens[token] = content or b""
    return ByteLevelParts(tokens, merges, bool(model.get("ignore_merges")), pattern, special)


def _check_model(model: dict[str, Any]) -> None:
    if model.get("type", "BPE") != "BPE":
        raise Unsupported(f"its model is {model.get('type')}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise Unsupported(f"its model uses {option}")
    if model.get("unk_token") is not None and model.get("fuse_unk"):
        raise Unsupported("its model fuses unknown tokens")


def _pattern(pre_tokenizer: Any) -> str:
    """The expression that a ByteLevel pre-tokenizer, or Split followed by ByteLevel, cuts by."""
    if not isinstance(pre_tokenizer, dict):
        raise Unsupported("it has no pre-tokenizer")
    config: dict[str, Any] = pre_tokenizer  # pyright: ignore[reportUnknownVariableType]
    steps: list[dict[str, Any]] = (
        config["pretokenizers"] if config.get("type") == "Sequence" else [config]
    )
    *splits, last = steps
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise Unsupported("its pre-tokenizer is not ByteLevel without a prefix space")
    if last.get("use_regex", True):
        if splits:
            raise Unsupported("its pre-tokenizer splits twice")
        return GPT2_PATTERN
    if len(splits) != 1 or splits[0].get("type") != "Split":
        raise Unsupported("its pre-tokenizer is not one Split and ByteLevel")
    split = splits[0]
    if split.get("behavior") != "Isolated" or split.get("invert"):
        raise Unsupported("its pre-tokenizer splits in another way than Isolated")
    expression = split["pattern"].get("Regex")
    if expression is None:
        raise Unsupported("its pre-tokenizer splits by a string")
    return str(expression)


def _added_tokens(added: list[dict[str, Any]]) -> list[tuple[str, int]]:
    special: list[tuple[str, int]] = []
    for token in added:
        if any(token.get(option) for option in ("single_word", "lstrip", "rstrip")):
            raise Unsupported(f"added token {token['content']!r} takes white space with it")
        special.append((str(token["content"]), int(token["id"])))
    # Tokens found before normalization come first; with a mix of both, order would matter.
    if len({bool(token.get("normalized")) for token in added}) > 1:
        raise Unsupported("its added tokens are found in two passes")
    return special


def gpt2_as_tokenizer_json(vocab: dict[str, int], merges: str) -> dict[str, Any]:
    """The tokenizer.json that GPT-2's two files stand for; <|endoftext|> is its special token."""
    lines = [line for line in merges.splitlines() if line and not line.startswith("#version")]
    end = "<|endoftext|>"
    added = [
        {
            "id": vocab[end],
            "content": end,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for _ in range(end in vocab)
    ]
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [tuple(line.split(" ")) for line in lines],
        },
    }


def gpt2_library(parsed: dict[str, Any]) -> Any:
    """The library's tokenizer of what ``gpt2_as_tokenizer_json`` gives, in a third of the time that
    it takes through text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    model = parsed["model"]
    made: Any = Tokenizer(models.BPE(model["vocab"], model["merges"]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(
        [AddedToken(t["content"], normalized=False, special=True) for t in parsed["added_tokens"]]
    )
    return made


def fast_encoder(parsed: dict[str, Any], parse_special: bool) -> tuple[Encoder | None, str]:
    """The fast encoder of a parsed tokenizer.json; or None and why not."""
    try:
        return byte_level_parts(parsed, parse_special).encoder(), ""
    except (Unsupported, InputError) as error:
        return None, str(error)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        return None, f"it has an unknown form ({error!r})"


def parse_gpt2(vocab_json: bytes, merges_txt: bytes) -> dict[str, Any]:
    """Read the two files. Raises ValueError if they are not what they should be."""
    vocab = json.loads(vocab_json)
    if not isinstance(vocab, dict) or not all(isinstance(v, int) for v in vocab.values()):  # pyright: ignore[reportUnknownVariableType]
        raise ValueError("vocab.json is not an object of ids")
    return gpt2_as_tokenizer_json(vocab, merges_txt.decode("utf-8"))  # pyright: ignore[reportUnknownArgumentType]
