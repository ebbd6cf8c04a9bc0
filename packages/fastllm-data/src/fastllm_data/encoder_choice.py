"""Which encoder a run uses, and the comparison of the fast one with the reference library."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType

from fastllm_core import Encoder, python_encoder
from fastllm_data.feed import texts_of
from fastllm_data.inputs import Source
from fastllm_data.options import TokenizeOptions
from fastllm_data.tokenizer import Tokenizer

Compare = Callable[[str, list[str]], int]
ReadTexts = Callable[[], list[str]]

PENDING = 16  # a sample of a stream holds a piece of it, of about a megabyte
SAMPLED_PIECES = 2


class EncoderDiffersError(Exception):
    """The fast encoder gave other ids than the reference library."""


def choose_encoder(options: TokenizeOptions, tokenizer: Tokenizer) -> tuple[Encoder, str]:
    """The fast encoder if there is one, else the reference library; and its name."""
    if options.reference_only:
        return reference_encoder(tokenizer), "reference"
    if tokenizer.load_fast is None:
        print(f"note: {tokenizer.no_fast_reason}; using the reference library", file=sys.stderr)
        return reference_encoder(tokenizer), "reference"
    return tokenizer.load_fast(), "fast"


def reference_encoder(tokenizer: Tokenizer) -> Encoder:
    """The reference library as the builder's encoder."""
    return python_encoder(tokenizer.reference.encode, tokenizer.vocab_size)


class SampleCheck:
    """Compares an encoder with the reference on samples, in a thread beside the building.

    Loading the reference library takes longer than all other preparation, so the builder does not
    wait for it. What it has built must not be kept before ``wait`` has returned.
    """

    def __init__(self, compare: Compare) -> None:
        self._compare = compare
        self._compared = 0
        self._waiting: deque[tuple[str, ReadTexts]] = deque()
        self._busy = self._stop = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="sample-check")

    def submit(self, name: str, read: ReadTexts) -> None:
        """Compare what ``read`` returns, which is called in the thread. Waits while PENDING others
        do, as they may hold pieces of inputs."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or len(self._waiting) < PENDING)
            self._waiting.append((name, read))
            self._changed.notify_all()
        self.poll()

    def tap(self, source: Source, keys: tuple[str, ...], count: int, form: str) -> FirstTexts:
        """What takes the first texts of an input out of its pieces as they pass."""
        return FirstTexts(partial(self.submit, source.name), keys, count, form)

    def poll(self) -> None:
        """Raise what the comparison has raised so far, EncoderDiffersError for other ids."""
        if self._error is not None:
            raise self._error

    def wait(self) -> int:
        """The number of texts compared, when all so far are. Raises as ``poll``."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not (self._waiting or self._busy))
        self.poll()
        return self._compared

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._waiting or self._stop)
                if self._stop:
                    return
                name, read = self._waiting.popleft()
                self._busy = True
            try:
                self._compared += self._compare(name, read())
            except BaseException as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return

    def __enter__(self) -> SampleCheck:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._changed:
            self._stop = True
            self._changed.notify_all()
        self._thread.join()


class FirstTexts:
    """Samples of an input that is read once, front to back: texts of its first pieces."""

    def __init__(
        self, submit: Callable[[ReadTexts], None], keys: tuple[str, ...], count: int, form: str
    ) -> None:
        self._submit, self._keys, self._form = submit, keys, form
        self._left, self._pieces = count, SAMPLED_PIECES

    def __call__(self, piece: bytes) -> None:
        if self._left > 0 and self._pieces > 0:
            self._submit(partial(texts_of, piece, self._keys, self._left, self._form))
            self._left -= piece.count(b"\n")
            self._pieces -= 1


def compare_texts(encoder: Encoder, tokenizer: Tokenizer, name: str, texts: list[str]) -> int:
    """Encode texts of the input ``name`` by both. Returns their number.

    Raises EncoderDiffersError, whose message names the input and the text.
    """
    expected = tokenizer.reference.encode(texts) if texts else []
    for text, got, want in zip(texts, encoder.encode_batch(texts), expected, strict=True):
        if got != want:
            raise EncoderDiffersError(
                f"{name}: the fast encoder differs from the reference on {text[:60]!r}"
            )
    return len(texts)
