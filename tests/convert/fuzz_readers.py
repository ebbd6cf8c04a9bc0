"""Coverage-guided fuzzing of everything that reads a file from elsewhere (not run by pytest).

    pip install atheris
    python tests/convert/fuzz_readers.py TARGET [libFuzzer options]

TARGET: pickle, zip, safetensors, sentencepiece or json.

Any exception other than ``UserError`` (``ValueError`` of the SentencePiece parser) is a crash.
Seeds are made here; findings become cases in the tests of the reader.
"""

from __future__ import annotations

import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris  # pyright: ignore

with atheris.instrument_imports():  # pyright: ignore
    from fastllm_convert.errors import UserError
    from fastllm_convert.files import json_file, safetensors_file, torch_pickle, torch_zip
    from fastllm_convert.files.torch_pickle_writer import Namespace, Ordered, Size, dumps
    from fastllm_convert.tokenizers import sentencepiece_model

# One file, rewritten for every input: readers take paths.
SCRATCH = Path(tempfile.mkdtemp(prefix="fastllm-fuzz-")) / "input"


def fuzz_pickle(data: bytes) -> None:
    try:
        torch_pickle.load(data, lambda storage: storage)
    except UserError:
        return


def fuzz_zip(data: bytes) -> None:
    SCRATCH.write_bytes(data)
    try:
        torch_zip.read_torch(SCRATCH)
    except UserError:
        return


def fuzz_safetensors(data: bytes) -> None:
    SCRATCH.write_bytes(struct.pack("<Q", len(data)) + data)
    try:
        safetensors_file.read_header(SCRATCH)
    except UserError:
        return


def fuzz_sentencepiece(data: bytes) -> None:
    try:
        sentencepiece_model.parse(data)
    except (ValueError, struct.error):
        return


def fuzz_json(data: bytes) -> None:
    try:
        json_file.parse_object(data, "input")
    except UserError:
        return


TARGETS: dict[str, Callable[[bytes], None]] = {
    "pickle": fuzz_pickle,
    "zip": fuzz_zip,
    "safetensors": fuzz_safetensors,
    "sentencepiece": fuzz_sentencepiece,
    "json": fuzz_json,
}


def seeds(target: str) -> list[bytes]:
    value = {"a": Ordered({"b": [1, -2, 3.5, None, True, "x"]}), "s": Size((2, 3)), "t": (1, 2, 3)}
    pickled, _ = dumps({**value, "n": Namespace({"x": 1 << 40})})
    if target == "zip":
        from fastllm_convert.files.torch_writer import torch_file

        file = torch_file("x", value)
        data = bytearray(file.size)
        assert file.finish is not None
        for offset, content in [*file.literals, *file.finish([])]:
            data[offset : offset + len(content)] = content
        return [bytes(data)]
    header = b'{"a":{"dtype":"BF16","shape":[0],"data_offsets":[0,0]}}'
    piece = b"\n\x05\n\x01a\x18\x01"
    return {
        "pickle": [pickled],
        "safetensors": [header],
        "json": [header],
        "sentencepiece": [piece + b"\x12\x02\x18\x02"],
    }[target]


def main() -> None:
    target = sys.argv[1] if len(sys.argv) > 1 else ""
    if target not in TARGETS:
        raise SystemExit(__doc__)
    corpus = Path(tempfile.mkdtemp(prefix=f"fastllm-fuzz-{target}-"))
    for index, seed in enumerate(seeds(target)):
        (corpus / str(index)).write_bytes(seed)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    atheris.Setup([sys.argv[0], *sys.argv[2:], str(corpus)], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
