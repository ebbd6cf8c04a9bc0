"""Train a SentencePiece BPE tokenizer like LLaMA's on the texts of JSONL files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastllm_data.documents import json_lines
from fastllm_data.errors import UserError
from fastllm_data.inputs import Source, find_sources
from fastllm_data.places import Places

# LLaMA's settings. `identity` keeps every character of the text, so decoding gives it back, and the
# fast encoder is exact for it. Ids: unk 0, bos 1, eos 2, then the 256 bytes.
TRAINER: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "character_coverage": 0.99995,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "unk_surface": " \u2047 ",
    "max_sentence_length": 16384,
    # The result depends on nothing but the text: one thread, and no random sample of the sentences.
    "num_threads": 1,
    "input_sentence_size": 0,
    "shuffle_input_sentence": False,
    "minloglevel": 2,
}
RESERVED = 3 + 256


@dataclass(frozen=True)
class Trained:
    """What was made."""

    path: Path
    vocab_size: int
    documents: int
    text_bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "tokenizer": str(self.path),
            "vocab_size": self.vocab_size,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "seconds": round(self.seconds, 3),
        }


def train_tokenizer(
    inputs: tuple[str, ...],
    vocab_size: int,
    out: Path,
    *,
    key: str = "text",
    max_bytes: int | None = None,
    form: str = "auto",
    force: bool = False,
) -> Trained:
    """Train on at most ``max_bytes`` of text (None: all); the same text gives the same file.

    ``out`` is the file, or a folder for ``tokenizer.model`` unless it ends in ``.model``.
    Raises UserError for bad lines, and for text too small for the vocabulary.
    """
    if vocab_size <= RESERVED:
        raise UserError(f"a vocabulary of {vocab_size} is too small: {RESERVED} ids are reserved")
    sources = find_sources(inputs, form)
    target = out if out.suffix == ".model" else out / "tokenizer.model"
    if target.exists() and not force:
        raise UserError(f"{target} exists", "--force replaces it")
    import sentencepiece

    started = time.perf_counter()
    texts = _Texts(sources, key, max_bytes)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    model = _Model()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, **TRAINER
        )
    except RuntimeError as error:
        if texts.error is not None:
            raise texts.error from error
        raise UserError(
            f"the tokenizer cannot be trained: {_reason(error)}",
            "use a smaller --vocab-size, or more text",
        ) from error
    if texts.error is not None:
        raise texts.error
    target.parent.mkdir(parents=True, exist_ok=True)
    with temporary.open("wb") as file:
        file.write(model.content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)
    return Trained(target, vocab_size, texts.documents, texts.bytes, time.perf_counter() - started)


def _reason(error: RuntimeError) -> str:
    """SentencePiece's message without its source location."""
    text = str(error).splitlines()[0] if str(error) else "no text"
    return text.rsplit("] ", 1)[-1].strip() or "there is no text"


class _Model:
    """What the trainer writes into."""

    def __init__(self) -> None:
        self.content = b""

    def write(self, content: bytes) -> None:
        self.content += content


class _Texts:
    """Iterates over lines of text; remembers why it stopped, as the trainer swallows exceptions."""

    def __init__(self, sources: list[Source], key: str, max_bytes: int | None) -> None:
        self._sources = sources
        self._key = key
        self._max_bytes = max_bytes
        self.documents = 0
        self.bytes = 0
        self.error: UserError | None = None

    def __iter__(self) -> Iterator[str]:
        places = Places()
        try:
            for source in self._sources:
                for number, line in enumerate(json_lines(source, (self._key,)), 1):
                    if not line.strip():
                        continue
                    text = self._text(line, ":".join(map(str, places.of(source, number))))
                    self.documents += 1
                    # The trainer takes lines; NUL is its end of a string.
                    yield from (part for part in text.replace("\0", "").split("\n") if part)
                    self.bytes += len(text.encode())
                    if self._max_bytes is not None and self.bytes >= self._max_bytes:
                        return
        except UserError as error:
            self.error = error

    def _text(self, line: bytes, place: str) -> str:
        try:
            record: Any = json.loads(line)
            text = record[self._key]
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"{place}: not JSON: {error}") from error
        except (KeyError, TypeError, IndexError) as error:
            raise UserError(f'{place}: field "{self._key}" is missing') from error
        if not isinstance(text, str):
            raise UserError(f'{place}: field "{self._key}" is not a string')
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{place}: half of a surrogate pair, which is no character") from error
        return text
