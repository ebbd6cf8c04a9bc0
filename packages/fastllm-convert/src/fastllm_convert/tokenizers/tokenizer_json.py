"""A SentencePiece model as a ``tokenizer.json`` that encodes the same.

SentencePiece's BPE merges the adjacent pair whose *result* scores highest, leftmost first; the
tokenizers library merges the pair with the lowest *rank*. Ranks therefore follow the scores of the
results, not the ids: a model whose whitespace pieces score lowest but have low ids (LLaMA's,
Mistral's) comes out wrong otherwise. Among pieces of one score SentencePiece takes the leftmost
pair each time, so a run of n spaces grows from the left; giving longer results the lower rank does
the same.
"""

from __future__ import annotations

import base64
from typing import Any

from fastllm_convert.errors import UserError
from fastllm_convert.tokenizers.sentencepiece_model import Kind, SentencePieceModel

_UNIGRAM, _BPE = 1, 2
_SPACE = "\u2581"  # SentencePiece's visible space


def build(model: SentencePieceModel, *, add_bos: bool) -> dict[str, Any]:
    """The object to write as ``tokenizer.json``. ``UserError`` for what it cannot express."""
    if model.whitespace_as_suffix or not model.escape_whitespaces:
        raise UserError(
            "a SentencePiece model with treat_whitespace_as_suffix, or without escaped whitespace, "
            "has no tokenizer.json"
        )
    if model.model_type not in (_UNIGRAM, _BPE):
        raise UserError("a SentencePiece model of words or characters has no tokenizer.json")
    texts = [t.text for t in model.tokens]
    if len(set(texts)) != len(texts):
        raise UserError("the SentencePiece model has one piece twice")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(model),
        "normalizer": _normalizer(model),
        "pre_tokenizer": None,
        "post_processor": _post_processor(model) if add_bos and model.bos_id >= 0 else None,
        "decoder": _decoder(model),
        "model": _bpe(model) if model.model_type == _BPE else _unigram(model),
    }


def limits(model: SentencePieceModel) -> list[str]:
    """Where the result may differ from SentencePiece, for the user to know."""
    found: list[str] = []
    if model.model_type == _UNIGRAM:
        found.append("tokenizer.json: a Unigram model may split runs of equal score differently")
    if any(t.kind is Kind.USER_DEFINED for t in model.tokens):
        found.append("tokenizer.json: text after a user-defined symbol may get a space piece")
    return found


def merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every way to make a piece of two pieces, in the order SentencePiece would apply them."""
    mergeable = {
        t.text: (t.score, i)
        for i, t in enumerate(model.tokens)
        if t.kind in (Kind.NORMAL, Kind.USER_DEFINED, Kind.UNUSED)
    }
    found: list[tuple[float, int, int, int, tuple[str, str]]] = []
    for text, (score, index) in mergeable.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in mergeable and right in mergeable:
                # Of the splits of one piece, the longer left part first: as when a run of equal
                # characters grows from the left.
                found.append((-score, -len(text), index, -cut, (left, right)))
    return [pair for *_, pair in sorted(found)]


def _bpe(model: SentencePieceModel) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": model.tokens[model.unk_id].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": model.byte_fallback,
        "ignore_merges": False,
        "vocab": {t.text: i for i, t in enumerate(model.tokens)},
        "merges": [list(pair) for pair in merges(model)],
    }


def _unigram(model: SentencePieceModel) -> dict[str, Any]:
    return {
        "type": "Unigram",
        "unk_id": model.unk_id,
        "vocab": [[t.text, t.score] for t in model.tokens],
        "byte_fallback": model.byte_fallback,
    }


def _added(model: SentencePieceModel) -> list[dict[str, Any]]:
    special = (Kind.UNKNOWN, Kind.CONTROL)
    return [
        {
            "id": i,
            "content": t.text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": t.kind in special,
        }
        for i, t in enumerate(model.tokens)
        if t.kind in (*special, Kind.USER_DEFINED)
    ]


def _normalizer(model: SentencePieceModel) -> dict[str, Any] | None:
    steps: list[dict[str, Any]] = []
    if model.charsmap:
        encoded = base64.b64encode(model.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": encoded})
    if model.remove_extra_whitespaces:
        steps += [_replace({"Regex": "^ +| +$"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if model.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": _SPACE})
    steps.append(_replace({"String": " "}, _SPACE))
    return {"type": "Sequence", "normalizers": steps}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _decoder(model: SentencePieceModel) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [_replace({"String": _SPACE}, " ")]
    if model.byte_fallback:
        steps.append({"type": "ByteFallback"})
    steps.append({"type": "Fuse"})
    if model.add_dummy_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _post_processor(model: SentencePieceModel) -> dict[str, Any]:
    bos = model.tokens[model.bos_id].text
    start: dict[str, Any] = {"SpecialToken": {"id": bos, "type_id": 0}}
    first: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    second: list[dict[str, Any]] = [
        {"SpecialToken": {"id": bos, "type_id": 1}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ]
    return {
        "type": "TemplateProcessing",
        "single": [start, first],
        "pair": [start, first, *second],
        "special_tokens": {bos: {"id": bos, "ids": [model.bos_id], "tokens": [bos]}},
    }


def tokenizer_config(
    model: SentencePieceModel, *, add_bos: bool, max_length: int
) -> dict[str, Any]:
    """``tokenizer_config.json``: the class that reads ``tokenizer.json`` as it stands.

    ``LlamaTokenizer`` would rebuild the merges (transformers 5: by piece id).
    """

    def name(index: int) -> str | None:
        return model.tokens[index].text if 0 <= index < len(model.tokens) else None

    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos and model.bos_id >= 0,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "bos_token": name(model.bos_id),
        "eos_token": name(model.eos_id),
        "pad_token": name(model.pad_id),
        "unk_token": name(model.unk_id),
    }
    return {k: v for k, v in config.items() if v is not None}
