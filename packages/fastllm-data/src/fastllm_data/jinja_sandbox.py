"""Jinja as Hugging Face runs it for chat templates, in its sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, cast

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastllm_data.chat_template import strftime_now


def _shared(environment: Environment) -> dict[str, Any]:
    """What every template of an environment sees."""
    return cast(dict[str, Any], cast(Any, environment).globals)


class Generation(Extension):
    """``{% generation %}…{% endgeneration %}``: around what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        shared = _shared(self.environment)
        start, stop = shared["generation_marks"]
        return f"{start}{caller()}{stop}"


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    cast(Any, environment).filters["tojson"] = tojson  # Jinja's own escapes HTML
    shared = _shared(environment)
    shared |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def compile_template(source: str, marks: tuple[str, str]) -> Any:
    """A template whose generation blocks stand between ``marks``. Raises TemplateSyntaxError."""
    environment = _environment()
    shared = _shared(environment)
    shared["generation_marks"] = marks
    return environment.from_string(source)


def has_generation(source: str) -> bool:
    """Whether a template has a generation block."""
    calls = _environment().parse(source).find_all(nodes.CallBlock)
    return any(
        isinstance(call.call.node, nodes.ExtensionAttribute) and call.call.node.name == "_mark"
        for call in calls
    )
