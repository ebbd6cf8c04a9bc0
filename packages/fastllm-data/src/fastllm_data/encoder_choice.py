"""Which encoder a run uses, and the comparison of the fast one with the reference library."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType

from fastllm_core import Encoder, python_encoder
from fastllm_data.documents import SplitText
from fastllm_data.feed import sample_texts
from fastllm_data.inputs import Source
from fastllm_data.options import TokenizeOptions
from fastllm_data.tokenizer import Tokenizer


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

    def __init__(self, compare: Callable[[], Iterator[int]]) -> None:
        """compare: yields the number of texts compared after each input; raises if they differ."""
        self._compare = compare
        self._compared = 0
        self._error: BaseException | None = None
        self._stop = False
        self._thread = threading.Thread(target=self._run, name="sample-check")

    def _run(self) -> None:
        try:
            for count in self._compare():
                self._compared += count
                if self._stop:
                    return
        except BaseException as error:
            self._error = error

    def poll(self) -> None:
        """Raise what the comparison has raised so far, EncoderDiffersError for other ids."""
        if self._error is not None:
            raise self._error

    def wait(self) -> int:
        """The number of texts compared, when all are. Raises as ``poll``."""
        self._thread.join()
        self.poll()
        return self._compared

    def __enter__(self) -> SampleCheck:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop = True
        self._thread.join()


def compare_samples(
    encoder: Encoder,
    options: TokenizeOptions,
    tokenizer: Tokenizer,
    sources: list[Source],
    split: SplitText | None,
) -> Iterator[int]:
    """Encode samples of every input by both; yields how many after each input.

    Raises EncoderDiffersError, whose message names the input and the text.
    """
    for source in sources if options.verify_sample else []:
        texts = sample_texts(source, options.keys, options.verify_sample, split)
        expected = tokenizer.reference.encode(texts) if texts else []
        for text, got, want in zip(texts, encoder.encode_batch(texts), expected, strict=True):
            if got != want:
                raise EncoderDiffersError(
                    f"{source.name}: the fast encoder differs from the reference on {text[:60]!r}"
                )
        yield len(texts)
