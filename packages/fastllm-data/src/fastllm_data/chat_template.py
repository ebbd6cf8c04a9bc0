"""Chat templates of Hugging Face tokenizers: render a chat, and know what the assistant said."""

from __future__ import annotations

import datetime
import hashlib
import json
import secrets
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from fastllm_data.errors import UserError

Messages = list[dict[str, Any]]
Span = tuple[int, int]  # characters [begin, end)
# What Python raises when a template does with a message's content what it does not allow.
REFUSALS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


class ChatError(ValueError):
    """A chat that cannot be rendered: what is wrong with it."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja template, run in Jinja's sandbox: it comes from elsewhere.

    special: ``bos_token`` and the like, which templates write. Whole tokens of ``stops`` at the end
    of a turn belong to it, white space after them does not.
    """

    source: str
    special: dict[str, str] = field(default_factory=dict[str, str])
    stops: tuple[str, ...] = ()

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source.encode()).hexdigest()

    @cached_property
    def _marks(self) -> tuple[str, str]:
        """What stands around the assistant's parts while rendering; no text can hold it."""
        key = secrets.token_hex(16)
        return f"\x02{key}<", f"\x02{key}>"

    @cached_property
    def _template(self) -> Any:
        from fastllm_data.jinja_sandbox import compile_template

        return compile_template(self.source, self._marks)

    @cached_property
    def has_generation(self) -> bool:
        """Whether the template says with ``{% generation %}`` what the assistant writes."""
        from fastllm_data.jinja_sandbox import has_generation

        return has_generation(self.source)

    def compile(self) -> None:
        """Raises jinja2.TemplateSyntaxError."""
        self._template  # noqa: B018 (cached)

    def render(self, messages: Messages, tools: Any, *, prompt: bool = False) -> str:
        """The text of a chat, and with ``prompt`` the start of the assistant's answer."""
        return (
            self._render(messages, tools, prompt)
            .replace(self._marks[0], "")
            .replace(self._marks[1], "")
        )

    def _render(self, messages: Messages, tools: Any, prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self.special,
            )
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise ChatError(f"the chat template refuses it: {error}") from error

    def render_spans(self, messages: Messages, tools: Any) -> tuple[str, list[Span]]:
        """The text, and where in it each message of the assistant stands, in order.

        Raises ChatError if the template does not let that be known.
        """
        spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if self.has_generation:
            text, spans = self._marked_spans(messages, tools)
            if len(spans) != len(spoken):
                raise ChatError(
                    f"the template marks {len(spans)} parts as the assistant's, "
                    f"but {len(spoken)} messages are"
                )
            return text, spans
        text = self.render(messages, tools)
        return text, [self._prefix_span(text, messages, tools, i) for i in spoken]

    def _marked_spans(self, messages: Messages, tools: Any) -> tuple[str, list[Span]]:
        start, stop = self._marks
        before, *parts = self._render(messages, tools, False).split(start)
        pieces, at = [before], len(before)
        spans: list[Span] = []
        for part in parts:
            inside, found, after = part.partition(stop)
            if not found:
                raise ChatError("the template nests {% generation %} blocks")
            spans.append((at, at + len(inside)))
            pieces += [inside, after]
            at += len(inside) + len(after)
        return "".join(pieces), spans

    def _prefix_span(self, text: str, messages: Messages, tools: Any, i: int) -> Span:
        """Message ``i`` is what it adds to the chat before it, rendered as a prompt."""
        before = self.render(messages[:i], tools, prompt=True)
        until = self.render(messages[: i + 1], tools)
        if not (until.startswith(before) and text.startswith(until)):
            raise ChatError(
                f"message {i + 1}: the template renders earlier messages differently once later "
                "ones follow, so it must mark the assistant's with {% generation %}"
            )
        said = until[len(before) :]
        bare = said.rstrip()
        if any(bare.endswith(token) for token in self.stops):
            said = bare
        return len(before), len(before) + len(said)


def load_chat_template(tokenizer: Path, given: Path | None, stops: tuple[str, ...]) -> ChatTemplate:
    """The template of a tokenizer folder, or the one in the file ``given``.

    From ``chat_template.jinja``, else ``tokenizer_config.json``. Raises UserError.
    """
    folder = tokenizer if tokenizer.is_dir() else tokenizer.parent
    config = _read_config(folder / "tokenizer_config.json")
    if given is not None:
        source = _read_text(given)
    elif (folder / "chat_template.jinja").is_file():
        source = _read_text(folder / "chat_template.jinja")
    else:
        source = _from_config(config, folder)
    special = {
        name: text
        for name in ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
        if (text := _token_text(config.get(name))) is not None
    }
    template = ChatTemplate(source, special, stops)
    from jinja2 import TemplateSyntaxError

    try:
        template.compile()
    except TemplateSyntaxError as error:
        raise UserError(
            f"chat template of {given or folder}: line {error.lineno}: {error.message}"
        ) from error
    return template


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"chat template {path}: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config: Any = json.loads(path.read_bytes())
        return dict(config)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not a tokenizer's configuration: {error}") from error


def _from_config(config: dict[str, Any], folder: Path) -> str:
    found: Any = config.get("chat_template")
    if isinstance(found, list):  # named ones, of which "default" is for chats without tools
        named = cast(list[Any], found)
        found = next((t["template"] for t in named if t.get("name") == "default"), None)
    if not isinstance(found, str):
        raise UserError(
            f"{folder}: the tokenizer has no chat template",
            "give one with --chat-template FILE.jinja",
        )
    return found


def _token_text(token: Any) -> str | None:
    if isinstance(token, dict):
        token = cast(dict[str, Any], token).get("content")
    return token if isinstance(token, str) else None


def strftime_now(form: str) -> str:
    """What templates call for today's date; fixed, so that the same chats give the same tokens."""
    return datetime.datetime(2024, 7, 26).strftime(form)
