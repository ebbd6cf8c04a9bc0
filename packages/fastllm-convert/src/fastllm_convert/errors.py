"""The one error a user sees: a message, an optional hint, exit status 2."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or environment. ``message`` is one line; ``hint`` says what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
