"""10,000 random changes to datasets and to inputs: never a crash, never a wrong answer for right.

The changes are those that disks, copies and people make: bits, words, cuts, insertions, holes.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastllm_data import IndexedDataset, UserError
from fastllm_data.inputs import find_sources
from fastllm_data.streams import open_source
from fastllm_data.tokenize import TokenizeOptions, tokenize
from fastllm_data.tokenizer import load_tokenizer
from fastllm_data.verify import verify

COUNT = 10_000
WORDS = 'the quick brown fox, naïve café 世界 \\ " \n\t jumps over 12 lazy dogs </s>'.split(" ")


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One change; may give back the same bytes."""
    content = bytearray(data)
    at = rng.randrange(len(content) + 1)
    size = rng.choice([1, 2, 4, 8, rng.randrange(1, 64)])
    kind = rng.randrange(9)
    if kind == 0 and at < len(content):
        content[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < len(content):
        content[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, 0x22, 0x5C, 0x7B, 0x0A, 0xC3, 0xED])
    elif kind == 2:  # a word of a likely size
        value = rng.choice([0, 1, -1, 2**31 - 1, -(2**31), rng.getrandbits(62)])
        width = rng.choice([4, 8])
        content[at : at + width] = value.to_bytes(9, "little", signed=True)[:width]
    elif kind == 3:
        del content[at:]  # cut short
    elif kind == 4:
        del content[at : at + size]
    elif kind == 5:
        content[at:at] = rng.randbytes(size)
    elif kind == 6:
        content += rng.randbytes(size)
    elif kind == 7:
        content[at : at + size] = bytes(len(content[at : at + size]))  # a hole
    else:
        other = rng.randrange(len(content) + 1)
        content[at : at + size] = content[other : other + size]  # a block in the wrong place
    return bytes(content)


def put(path: Path, content: bytes) -> None:
    """As a new file: some file systems wait for the disk when one is cut and rewritten."""
    path.unlink()
    path.write_bytes(content)


def write_corpus(path: Path, documents: int) -> Path:
    rng = random.Random(0)
    lines = [
        json.dumps(
            {"id": i, "text": " ".join(rng.choice(WORDS) for _ in range(rng.randrange(12)))},
            ensure_ascii=bool(i % 2),
        )
        for i in range(documents)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def dataset(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutations")
    source = write_corpus(folder / "in.jsonl", 120)
    tokenize(TokenizeOptions((str(source),), small_model, folder / "c", append_eod=True))
    return folder / "c_text_document"


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_verify_finds_every_change_of_a_dataset(suffix: str, dataset: Path) -> None:
    path = dataset.with_name(dataset.name + suffix)
    good = path.read_bytes()
    rng = random.Random(suffix)
    tried = 0
    try:
        while tried < COUNT:
            changed = mutate(good, rng)
            if changed == good:
                continue
            tried += 1
            put(path, changed)
            verdict = verify(dataset)
            assert any(str(path) in problem or ".bin" in problem for problem in verdict.problems)
    finally:
        put(path, good)
    assert verify(dataset).ok


def test_the_reader_refuses_or_stays_within_the_file(dataset: Path) -> None:
    """Without a sidecar a changed index is refused, or still describes exactly the .bin."""
    path = dataset.with_name(dataset.name + ".idx")
    good = path.read_bytes()
    tokens = IndexedDataset(dataset).tokens.tolist()
    rng = random.Random(1)
    refused = 0
    try:
        for _ in range(2000):
            put(path, mutate(good, rng))
            try:
                ds = IndexedDataset(dataset)
            except UserError:
                refused += 1
                continue
            if ds.dtype.name == "uint16":
                read = [t for i in range(len(ds)) for t in ds[i].tolist()]
                assert read == tokens
                assert [t for d in range(ds.documents) for t in ds.document(d).tolist()] == tokens
    finally:
        put(path, good)
    assert refused > 1000


def text_of(line: bytes) -> str | list[str] | None:
    """What the line says by Python's parser; None if it is bad."""
    try:
        value = json.loads(line.decode())["text"]
        texts = value if isinstance(value, list) else [value]
        for text in texts:
            text.encode()
        return value
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def test_every_changed_line_is_read_right_or_named(small_model: Path, tmp_path: Path) -> None:
    rng = random.Random(2)
    good = write_corpus(tmp_path / "good.jsonl", 300).read_bytes().splitlines()
    content = b"\n".join(mutate(rng.choice(good), rng) for _ in range(COUNT))
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    options = TokenizeOptions(
        (str(path),), small_model, tmp_path / "c", on_error="quarantine", workers=2
    )
    counts = tokenize(options).counts
    # Lines end with \n; blank ones are passed over, and a byte order mark at the start.
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    if not lines[-1]:
        lines.pop()
    texts = [
        (number, text_of(line)) for number, line in enumerate(lines, 1) if line.strip(b" \t\r")
    ]
    bad = [number for number, text in texts if text is None]
    assert len(bad) > 1000
    assert counts["bad_lines"] == len(bad)
    named = (tmp_path / "c.errors.txt").read_bytes().decode("utf-8", "replace").split("\n")[:-1]
    assert [int(said.removeprefix(f"{path}:").split(":")[0]) for said in named] == bad
    quarantined = (tmp_path / "c.quarantine").read_bytes().split(b"\n")[:-1]
    assert quarantined == [lines[number - 1] for number in bad]
    reference = load_tokenizer(small_model).reference
    made = IndexedDataset(tmp_path / "c_text_document")
    held = [text for _, text in texts if text is not None]
    assert made.documents == len(held) == counts["documents"]
    for d, value in enumerate(held):
        wanted = reference.encode(value if isinstance(value, list) else [value])
        assert made.document(d).tolist() == [i for ids in wanted for i in ids]


@pytest.mark.parametrize("isal", [True, False])
def test_changed_gzip_is_refused_or_says_the_same(
    isal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isal:
        pytest.importorskip("isal", reason="pip install 'fastllm-data[isal]'")
    else:
        monkeypatch.setitem(sys.modules, "isal.igzip", None)
    content = write_corpus(tmp_path / "x", 60).read_bytes()
    compressed = gzip.compress(content)
    path = tmp_path / "x.gz"
    path.touch()
    rng = random.Random(3)
    refused = 0
    read: Callable[[], bytes]
    for _ in range(2000):
        put(path, mutate(compressed, rng))
        (source,) = find_sources((str(path),))
        try:
            with open_source(source) as stream:
                read = stream.read
                assert read() == content
        except UserError:
            refused += 1
    assert refused > 1500
