"""Chats as token ids and, for each id, whether the model learns to say it."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from fastllm_data.chat_template import ChatError, ChatTemplate, Messages, Span
from fastllm_data.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True)
class Chat:
    """Messages, and which of them (by number) are learnt."""

    messages: Messages
    tools: Any
    learnt: frozenset[int]


@dataclass(frozen=True)
class EncodedChat:
    """``weights``: uint8, 1 where the token is learnt. ``straddling``: see ``weights_of``."""

    ids: NDArray[np.int64]
    weights: NDArray[np.uint8]
    straddling: int


def read_chat(line: bytes | str, train_on: str) -> Chat:
    """One line of chat JSONL. Raises ChatError.

    ``{"messages": [{"role", "content"}, …]}``, or ``{"prompt", "completion"}``, each a text or a
    list of messages; ``tools`` are passed on to the template. train_on: ``all`` of the assistant's
    messages (of a completion), or the ``last``. A message with ``"weight": 0`` is not learnt.
    """
    try:
        record: Any = json.loads(line)
    except ValueError as error:
        raise ChatError(f"not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ChatError("not a JSON object")
    content = cast(dict[str, Any], record)
    first = 0
    if content.get("messages") is not None:
        messages = _messages(content["messages"], "messages", "")
    elif "prompt" in content and "completion" in content:
        messages = _messages(content["prompt"], "prompt", "user")
        first = len(messages)
        messages += _messages(content["completion"], "completion", "assistant")
    else:
        raise ChatError('neither "messages" nor "prompt" and "completion"')
    spoken = [i for i in range(first, len(messages)) if messages[i]["role"] == "assistant"]
    if train_on == "last":
        spoken = spoken[-1:]
    learnt = frozenset(i for i in spoken if messages[i].get("weight", 1) != 0)
    if not learnt:
        raise ChatError("no message of the assistant to learn from")
    return Chat(messages, content.get("tools"), learnt)


def _messages(value: Any, name: str, role: str) -> Messages:
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ChatError(f'"{name}" is not {"a text or " if role else ""}a list of messages')
    found: Messages = []
    for number, message in enumerate(cast(list[Any], value), 1):
        said = cast(dict[str, Any], message) if isinstance(message, dict) else {}
        if said.get("role") not in ROLES:
            raise ChatError(f'"{name}": message {number} has no role of {", ".join(ROLES)}')
        if said.get("content") is None and not said.get("tool_calls"):
            raise ChatError(f'"{name}": message {number} has no content')
        try:
            found.append({**said, "content": _text(said.get("content"))})
        except ChatError as error:
            raise ChatError(f'"{name}": message {number}: {error}') from error
    return found


def _text(content: Any) -> str:
    """A message's content as one text: templates print anything else as Python shows it."""
    if content is None:  # a call of a tool
        return ""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in cast(list[Any], content) if isinstance(content, list) else [content]:
        item = cast(dict[str, Any], part) if isinstance(part, dict) else {}
        if item.get("type") != "text" or not isinstance(item.get("text"), str):
            raise ChatError("its content is neither a text nor a list of texts")
        texts.append(item["text"])
    return "".join(texts)


class ChatEncoder:
    """Renders chats with a template and encodes them with Hugging Face's tokenizers library."""

    def __init__(self, tokenizer_json: Path, template: ChatTemplate) -> None:
        self._template = template
        self._encoder = load_offsets_tokenizer(tokenizer_json)

    def render(self, chat: Chat) -> tuple[str, list[Span]]:
        """The text of a chat, and the parts of it that are learnt. Raises ChatError."""
        text, spans = self._template.render_spans(chat.messages, chat.tools)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ChatError("half of a surrogate pair, which is no character") from error
        spoken = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant"]
        return text, [s for i, s in zip(spoken, spans, strict=True) if i in chat.learnt]

    def encode(self, rendered: Sequence[tuple[str, list[Span]]]) -> list[EncodedChat]:
        """In one call of the library, which uses all its threads."""
        texts = [text for text, _ in rendered]
        encodings: list[Any] = self._encoder.encode_batch(texts, add_special_tokens=False)
        return [
            EncodedChat(np.array(e.ids, dtype=np.int64), *weights_of(e.offsets, spans))
            for e, (_, spans) in zip(encodings, rendered, strict=True)
        ]


def weights_of(offsets: Sequence[Span], spans: Sequence[Span]) -> tuple[NDArray[np.uint8], int]:
    """1 for tokens that lie wholly in a span, else 0; and how many lie in one only partly.

    So no token that holds a character of the prompt is ever learnt. spans: disjoint, in order.
    """
    if not offsets or not spans:
        return np.zeros(len(offsets), dtype=np.uint8), 0
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]
    begins, ends = np.array(offsets, dtype=np.int64).T
    starts: NDArray[np.int64] = np.array([start for start, _ in spans], dtype=np.int64)
    stops: NDArray[np.int64] = np.array([stop for _, stop in spans], dtype=np.int64)
    # The first span that ends after the token begins is the only one that can hold it.
    at = np.searchsorted(stops, begins, side="right")
    known = (at < len(spans)) & (begins < ends)
    at = np.minimum(at, len(spans) - 1)
    inside = known & (begins >= starts[at]) & (ends <= stops[at])
    partly = known & ~inside & (ends > starts[at])
    return inside.astype(np.uint8), int(np.count_nonzero(partly))


def load_offsets_tokenizer(path: Path) -> Any:
    """A tokenizer.json whose offsets are those of every character, and which never cuts or pads.

    Raises UserError.
    """
    hf: Any = importlib.import_module("tokenizers")
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        content |= {"post_processor": None, "truncation": None, "padding": None}
        return hf.Tokenizer.from_str(json.dumps(content))
    except OSError as error:
        raise UserError(f"tokenizer {path}: {error.strerror}") from error
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"tokenizer {path}: not a tokenizer.json: {error}") from error
