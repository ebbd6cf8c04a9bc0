"""What a user did wrong, in one line, with what to do about it."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input or the environment: printed as ``error:`` and ``hint:``, exit 2."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
