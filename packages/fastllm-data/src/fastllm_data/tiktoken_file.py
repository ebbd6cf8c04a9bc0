"""tiktoken-style rank files (Llama-3, cl100k, o200k, Qwen) and Mistral's tekken JSON.

Such a file holds tokens and ranks only; the expression and the special tokens are published apart.
They are found by the number of ranks; sources: openai/tiktoken ``openai_public.py``,
meta-llama/llama-models ``llama3/tokenizer.py``, QwenLM/Qwen ``tokenization_qwen.py``.
"""

from __future__ import annotations

import base64
import binascii
import importlib
from binascii import a2b_base64
from dataclasses import dataclass
from typing import Any

from fastllm_core import Encoder, bytelevel_encoder
from fastllm_data.errors import UserError
from fastllm_data.tokenizer_json import GPT2_PATTERN

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_FIRST = r"[^\r\n\p{L}\p{N}]?"
CL100K_PATTERN = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _TAIL
)
QWEN_PATTERN = CL100K_PATTERN.replace("{1,3}", "")
O200K_PATTERN = (
    f"{_FIRST}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_FIRST}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _TAIL
)


@dataclass(frozen=True)
class Family:
    """What goes with a number of ranks."""

    name: str
    pattern: str
    vocab_size: int
    eod_id: int
    bos_id: int | None = None


FAMILIES = {
    50256: Family("gpt2", GPT2_PATTERN, 50257, 50256),
    100256: Family("cl100k_base", CL100K_PATTERN, 100277, 100257),
    128000: Family("llama3", CL100K_PATTERN, 128256, 128001, 128000),
    151643: Family("qwen", QWEN_PATTERN, 151646, 151643),
    199998: Family("o200k_base", O200K_PATTERN, 200019, 199999),
}
TEKKEN_BOS, TEKKEN_EOS = 1, 2


@dataclass(frozen=True)
class RankFile:
    """Tokens by rank; an id is ``rank + first_id``."""

    family: Family
    tokens: list[bytes]
    first_id: int = 0

    def fast(self) -> Encoder:
        return bytelevel_encoder(
            tokens=[b""] * self.first_id + self.tokens,
            merges=None,
            ignore_merges=True,
            pattern=self.family.pattern,
            special=[],
        )

    def reference(self) -> Any:
        """tiktoken's Encoding. Raises UserError if that package is missing."""
        try:
            tiktoken: Any = importlib.import_module("tiktoken")
        except ImportError as error:
            raise UserError(
                "the reference library tiktoken is not installed",
                "pip install 'fastllm-data[tiktoken]'",
            ) from error
        return tiktoken.Encoding(
            self.family.name,
            pat_str=self.family.pattern,
            mergeable_ranks={token: rank for rank, token in enumerate(self.tokens)},
            special_tokens={},
        )


def looks_like_rank_file(content: bytes) -> bool:
    """Whether the first line is base64, a space, and a number."""
    first, _, rank = content[:400].split(b"\n", 1)[0].strip().partition(b" ")
    try:
        return bool(first) and rank.isdigit() and bool(base64.b64decode(first, validate=True))
    except binascii.Error:
        return False


def parse_rank_file(name: str, content: bytes) -> RankFile:
    """Read ``base64 rank`` lines. Raises UserError if ranks have gaps or the family is unknown."""
    words = content.split()
    try:
        tokens = [a2b_base64(word, strict_mode=True) for word in words[::2]]
        in_order = words[1::2] == [b"%d" % rank for rank in range(len(tokens))]
    except binascii.Error:
        tokens, in_order = [], False
    if not in_order or content.count(b"\n") < len(tokens) - 1:
        tokens = _read_lines(name, content)
    family = FAMILIES.get(len(tokens))
    if family is None:
        known = ", ".join(f"{size} ({f.name})" for size, f in FAMILIES.items())
        raise UserError(f"{name}: {len(tokens)} ranks: not one of the known families", known)
    return RankFile(family, tokens)


def _read_lines(name: str, content: bytes) -> list[bytes]:
    """The same line by line, to say which one is wrong."""
    tokens: list[bytes] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            if int(rank) != len(tokens):
                raise UserError(f"{name}:{number}: rank {int(rank)}, expected {len(tokens)}")
            tokens.append(base64.b64decode(token, validate=True))
        except ValueError as error:
            raise UserError(f"{name}:{number}: not 'base64 rank'") from error
    return tokens


def parse_tekken(name: str, parsed: dict[str, Any]) -> RankFile:
    """Read Mistral's tekken JSON: its pattern, and ids after the special ones."""
    try:
        config = parsed["config"]
        special, size = (
            int(config["default_num_special_tokens"]),
            int(config["default_vocab_size"]),
        )
        tokens = [base64.b64decode(t["token_bytes"]) for t in parsed["vocab"][: size - special]]
        ranks = [int(t["rank"]) for t in parsed["vocab"][: size - special]]
        pattern = str(config["pattern"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{name}: not a tekken file: {error!r}") from error
    if ranks != list(range(len(tokens))) or special < 0:
        raise UserError(f"{name}: not a tekken file: its ranks have gaps")
    family = Family("tekken", pattern, size, TEKKEN_EOS, TEKKEN_BOS)
    return RankFile(family, tokens, first_id=special)
