"""Which files go along with the weights, and which are made from a bare SentencePiece model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastllm_convert.checkpoint import Companions
from fastllm_convert.errors import UserError
from fastllm_convert.files.json_file import dump
from fastllm_planner.arch import ArchSpec

# Copied byte for byte when present.
_CARRIED = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.md",
    "LICENSE.txt",
    "USE_POLICY.md",
    "NOTICE",
    "README.md",
)
_MAX_BYTES = 256 << 20


@dataclass(frozen=True)
class Carried:
    """``files``: name → content. ``token_ids``: bos/eos/pad ids the tokenizer knows."""

    files: Mapping[str, bytes]
    token_ids: Mapping[str, int] = field(default_factory=dict[str, int])
    notes: Sequence[str] = ()


def carried_files(companions: Companions, spec: ArchSpec) -> Carried:
    """The tokenizer and other files of the source folder, completed to what transformers loads."""
    folder, given = companions.folder, companions.tokenizer_model
    found = {n: folder / n for n in _CARRIED if folder is not None and (folder / n).is_file()}
    if given is not None:
        found["tokenizer.model"] = given
    files = {name: _read(path) for name, path in found.items()}
    if "tokenizer.model" not in files or "tokenizer.json" in files:
        return Carried(files)
    from fastllm_convert.tokenizers import tiktoken_ranks

    path = found["tokenizer.model"]
    if files["tokenizer.model"][:1] == b"\n":  # field 1, wire type 2: SentencePiece's first piece
        return _sentencepiece(files, path, companions, spec)
    ranks = tiktoken_ranks.parse(files["tokenizer.model"])
    if ranks is None:
        return Carried(files, notes=[f"{path} is of an unknown kind: carried as it is"])
    return _tiktoken(files, path, ranks, spec)


def _check_vocabulary(count: int, path: Path, spec: ArchSpec) -> None:
    if count > spec.vocab:
        raise UserError(
            f"{path} has {count:,} pieces, the model's vocabulary is {spec.vocab:,}",
            hint="this is another model's tokenizer",
        )


def _tiktoken(files: dict[str, bytes], path: Path, ranks: list[bytes], spec: ArchSpec) -> Carried:
    from fastllm_convert.tokenizers import tiktoken_ranks

    specials = tiktoken_ranks.special_names(scaled_rope=bool(spec.rope.scaling))
    _check_vocabulary(len(ranks) + len(specials), path, spec)
    files["tokenizer.json"] = dump(tiktoken_ranks.build(ranks, specials))
    config = tiktoken_ranks.tokenizer_config(specials, max_length=spec.max_seq_len)
    files.setdefault("tokenizer_config.json", dump(config))
    return Carried(files, {"bos_token_id": len(ranks), "eos_token_id": len(ranks) + 1})


def _sentencepiece(
    files: dict[str, bytes], path: Path, companions: Companions, spec: ArchSpec
) -> Carried:
    from fastllm_convert.tokenizers import sentencepiece_model, tokenizer_json

    model = sentencepiece_model.read(path)
    _check_vocabulary(len(model.tokens), path, spec)
    ids = {"bos_token_id": model.bos_id, "eos_token_id": model.eos_id, "pad_token_id": model.pad_id}
    token_ids = {k: v for k, v in ids.items() if 0 <= v < len(model.tokens)}
    try:
        converted = tokenizer_json.build(model, add_bos=companions.add_bos)
    except UserError as error:
        return Carried(files, token_ids, [f"{error.message}: only tokenizer.model is carried"])
    config = tokenizer_json.tokenizer_config(
        model, add_bos=companions.add_bos, max_length=spec.max_seq_len
    )
    files["tokenizer.json"] = dump(converted)
    files.setdefault("tokenizer_config.json", dump(config))
    return Carried(files, token_ids, tokenizer_json.limits(model))


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise UserError(f"{path} is larger than {_MAX_BYTES >> 20} MB: not a tokenizer file")
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
