"""The arguments that a launch script gives to its training program. Nothing is executed.

Understands what launch scripts are made of: assignments, ``${NAME}`` and ``${NAME:-default}``,
arrays, continued lines, ``$((…))`` of whole numbers and here-documents.
"""

from __future__ import annotations

import ast
import operator
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from fastllm_train.errors import UserError

_ASSIGNMENT = re.compile(r"^\s*(?:export\s+)?([A-Za-z_]\w*)(\+?)=(.*)$", re.DOTALL)
_REFERENCE = re.compile(
    r"\$\(\((?P<sum>[^()]*)\)\)|\$\{(?P<name>[A-Za-z_]\w*)(?:\[[@*]\])?(?::?-(?P<default>[^}]*))?\}"
    r"|\$(?P<plain>[A-Za-z_]\w*|\d)"
)
_HERE_DOCUMENT = re.compile(r"<<-?\s*(['\"]?)(\w+)['\"]?")
_TARGET = re.compile(r"(?<!<)>\s*([^\s<>|;&]+)")
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,  # the shell's division is whole
    ast.Mod: operator.mod,
}


@dataclass(frozen=True)
class Command:
    """``launcher``: words before the training program; ``arguments``: words after it;
    ``documents``: what the script writes into files by here-documents before, by their names."""

    launcher: tuple[str, ...]
    arguments: tuple[str, ...]
    documents: Mapping[str, str] = field(default_factory=dict[str, str])


def training_command(text: str) -> Command:
    """The last command of the script that runs a Python program with options. ``UserError`` when
    there is none. A variable that the script does not set stays as ``$NAME``."""
    variables: dict[str, str] = {}
    documents: dict[str, str] = {}
    found: Command | None = None
    for line, document in _lines(text):
        here, target = _HERE_DOCUMENT.search(line), _TARGET.search(line)
        if document is not None and here is not None and target is not None:
            name = _expand(target[1].strip("\"'"), variables)
            documents[name] = document if here[1] else _expand(document, variables)
        assignment = _ASSIGNMENT.match(line)
        if assignment is not None and not _trailing_command(assignment[3]):
            name, more, value = assignment.groups()
            value = _expand(_unquoted(value), variables)
            variables[name] = f"{variables.get(name, '')} {value}" if more else value
            continue
        try:
            # Quoted, an array is still its words.
            line = re.sub(r'"(\$\{\w+\[@\]\})"', r"\1", line)
            words = shlex.split(_expand(line, variables), comments=True)
        except ValueError:
            continue  # an unbalanced quote: no command that we could read
        program = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if program is not None and any(w.startswith("--") for w in words[program + 1 :]):
            found = Command(tuple(words[:program]), tuple(words[program + 1 :]), dict(documents))
    if found is None:
        raise UserError(
            "the script runs no Python program with options",
            hint="give the script that holds the torchrun or deepspeed command",
        )
    return found


def _lines(text: str) -> list[tuple[str, str | None]]:
    """Logical lines, continued ones joined, arrays in one; each with the text of its
    here-document."""
    lines: list[tuple[str, str | None]] = []
    until: str | None = None
    document: list[str] = []
    pending = ""
    for raw in text.replace("\r\n", "\n").split("\n"):
        if until is not None:
            if raw.strip() != until:
                document.append(raw)
                continue
            lines.append((pending, "\n".join(document)))
            until, pending = None, ""
            continue
        line = raw if not raw.lstrip().startswith("#") else ""
        pending += line
        if line.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        if _open_value(pending):
            pending += "\n"
            continue
        here = _HERE_DOCUMENT.search(pending)
        if here is not None:
            until, document = here[2], []
            continue
        lines.append((pending, None))
        pending = ""
    return [*lines, (pending, None)]


def _open_value(text: str) -> bool:
    """Whether an assignment's array or quoted string goes on."""
    assignment = _ASSIGNMENT.match(text)
    if assignment is None:
        return False
    value = assignment[3].strip()
    if value.startswith("("):
        return not value.endswith(")")
    return value[:1] in ('"', "'") and (len(value) == 1 or value[-1] != value[0])


def _trailing_command(value: str) -> bool:
    """``A=1 torchrun …``: the assignment is only for that command."""
    try:
        words = shlex.split(value) if not value.strip().startswith("(") else [value]
    except ValueError:
        return False
    return any(word.endswith(".py") for word in words) and value[:1] not in ('"', "'")


def _unquoted(value: str) -> str:
    value = value.strip()
    if value.startswith("(") and value.endswith(")"):
        lines = (line.split(" #")[0] for line in value[1:-1].split("\n"))
        return " ".join(line for line in lines if not line.lstrip().startswith("#"))
    quoted = re.match(r"""^(["'])(.*)\1\s*(?:#.*)?$""", value, re.DOTALL)
    if quoted is not None:
        return quoted[2]
    return re.split(r"\s[#;]|;", value)[0].strip()


def _expand(text: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match["sum"] is not None:
            return _arithmetic(_expand(match["sum"], variables), variables) or match[0]
        name = match["name"] or match["plain"]
        if name in variables:
            return variables[name]
        return match["default"] if match["default"] is not None else f"${name}"

    return _REFERENCE.sub(value, text)


def _arithmetic(text: str, variables: dict[str, str]) -> str | None:
    """The value of ``$((text))``, or None for more than sums and products of whole numbers."""
    try:
        return str(_number(ast.parse(text.strip(), mode="eval").body, variables))
    except (SyntaxError, ValueError, ZeroDivisionError, KeyError, RecursionError):
        return None


def _number(node: ast.expr, variables: dict[str, str]) -> int:
    if isinstance(node, ast.BinOp):
        left, right = (_number(side, variables) for side in (node.left, node.right))
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Name):
        return int(variables[node.id])
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    raise ValueError
