"""Errors to put in on purpose: a comparison that does not see them compares nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, wrong: Callable[..., Any]) -> Iterator[None]:
    """``owner.name`` calls ``wrong`` with itself and its arguments."""
    kept = getattr(owner, name)
    setattr(owner, name, lambda *args: wrong(kept, *args))
    try:
        yield
    finally:
        setattr(owner, name, kept)


def left_out(_: Any, *args: Any) -> Any:
    """In place of a collective function: x itself."""
    return args[0]


def left_out_once() -> Callable[..., Any]:
    """The second call does nothing: one micro-batch, behind one layer's attention."""
    calls = count(1)
    return lambda collective, *args: args[0] if next(calls) == 2 else collective(*args)
