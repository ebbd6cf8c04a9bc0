"""The many spellings of a board's name: ``NVIDIA A100-SXM4-80GB``, ``h100 pcie``, ``A100-40G``.

A name is read as words: the board, its form factor and its memory. What else vendors, drivers and
papers write beside them (maker, memory technology, power limit) tells no two boards apart here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_MAKERS = {"nvidia", "amd", "instinct", "tesla", "geforce", "dgx", "hgx", "tensor", "core", "gpu"}
_SILENT = re.compile(r"hbm\d?e?|\d+w|gen\d|oam|nvl\d+|nvlink\d?|air|liquid|cooled|blackwell|hopper")
_FORM = re.compile(r"(sxm|pcie|nvl)\d?")
_MEMORY = re.compile(r"(\d{2,3})(?:gb?|gib)?")


@dataclass(frozen=True)
class BoardName:
    """What a name says. ``form``: "sxm", "pcie", "nvl" or "" (not said); ``memory_gb``: 0 if not
    said; ``unknown``: words that mean nothing here."""

    board: str
    form: str
    memory_gb: int
    unknown: tuple[str, ...]


def _words(name: str) -> list[str]:
    """Lower-case words of a name, the maker's at its start left out."""
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word]
    while words and words[0] in _MAKERS:
        words.pop(0)
    return words


def squeeze(name: str) -> str:
    """Letters and digits only, without the maker: how two spellings of one name are compared."""
    return "".join(_words(name))


def read_board_name(name: str, boards: Iterable[str]) -> BoardName | None:
    """The board of ``boards`` (squeezed: "rtx4090") that a name starts with, and what follows.

    None if it starts with none of them.
    """
    words = _words(name)
    found = ""
    used = 0
    for board in boards:
        length = _words_of(board, words)
        if length and len(board) > len(found):
            found, used = board, length
    if not found:
        return None
    rest = words[used:]
    if glued := "".join(words[:used])[len(found) :]:  # "A100SXM4": the form follows without a space
        rest = [glued, *rest]
    return _read_rest(found, rest)


def _words_of(board: str, words: list[str]) -> int:
    """How many words at the start spell ``board``, a form factor glued to it included; 0 if none
    do."""
    text = ""
    for count, word in enumerate(words, start=1):
        text += word
        if text == board:
            return count
        if text.startswith(board):
            return count if _FORM.fullmatch(text[len(board) :]) else 0
        if not board.startswith(text):
            return 0
    return 0


def _read_rest(board: str, words: list[str]) -> BoardName:
    form, memory, unknown = "", 0, list[str]()
    for word in words:
        if found := _FORM.fullmatch(word):
            form = found.group(1)
        elif found := _MEMORY.fullmatch(word):
            memory = int(found.group(1))
        elif word not in _MAKERS and not _SILENT.fullmatch(word):
            unknown.append(word)
    return BoardName(board, form, memory, tuple(unknown))
