"""The error a user can act on; ``__main__`` prints it as ``error:`` and ``hint:`` and exits 2."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input or the environment. ``hint`` says what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class PeerError(UserError):
    """An error that happened, and is reported, on another rank."""
