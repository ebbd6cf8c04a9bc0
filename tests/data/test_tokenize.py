"""The tokenize command: inputs, switches, errors, and that nothing is left behind."""

from __future__ import annotations

import gzip
import io
import json
import random
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from fastllm_data import IndexedDataset
from fastllm_data import tokenize as tokenize_module
from fastllm_data.__main__ import main
from fastllm_data.cli.app import VERBS, app
from fastllm_data.encoder_choice import EncoderDiffersError
from fastllm_data.tokenizer import Reference, load_tokenizer
from fastllm_data.verify import verify

TEXTS = [
    "the quick brown fox",
    "",
    "naïve café " * 40,
    "世界\n\n  def f(x):",
    "12 times over a lazy dog",
]


def write_jsonl(path: Path, texts: list[str] = TEXTS) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "in.jsonl")


def bytes_of(prefix: Path) -> tuple[bytes, bytes]:
    return (
        prefix.with_name(prefix.name + "_text_document.bin").read_bytes(),
        prefix.with_name(prefix.name + "_text_document.idx").read_bytes(),
    )


def test_verbs_are_listed_with_their_own_help() -> None:
    for name, line in VERBS.items():
        command = app.get_command(None, name)  # pyright: ignore[reportArgumentType]
        assert command is not None
        assert (command.help or "").startswith(line), name


def test_dataset_and_sidecar(
    source: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "c"
    status, stdout, _ = run(
        capsys,
        "tokenize",
        source,
        "--tokenizer",
        small_model,
        "--append-eod",
        "--out",
        out,
        "--json",
    )
    assert status == 0
    summary = json.loads(stdout)
    assert summary["documents"] == 5
    assert summary["empty_documents"] == 1
    dataset = IndexedDataset(tmp_path / "out" / "c_text_document")
    reference = load_tokenizer(small_model).reference
    ids = [[*i, 2] if i else [] for i in reference.encode(TEXTS)]
    assert [dataset.document(d).tolist() for d in range(5)] == ids
    assert summary["tokens"] == sum(map(len, ids))
    meta = json.loads((tmp_path / "out" / "c_text_document.meta.json").read_text())
    assert meta["counts"]["text_bytes"] == sum(len(t.encode()) for t in TEXTS)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"c_text_document.{s}" for s in ("bin", "idx", "meta.json")
    ]


def test_decode_gives_the_text_back(
    source: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["tokenize", source, "--tokenizer", small_model, "--append-eod", "--out", tmp_path / "c"]
    assert run(capsys, *args)[0] == 0
    status, stdout, _ = run(
        capsys, "decode", tmp_path / "c_text_document", "--tokenizer", small_model
    )
    assert status == 0
    assert [json.loads(line)["text"] for line in stdout.splitlines()] == TEXTS


def test_gz_and_standard_input_equal_the_plain_file(
    source: Path,
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tail = ("--tokenizer", small_model, "--out")
    assert run(capsys, "tokenize", source, *tail, tmp_path / "plain")[0] == 0
    # Two gzip members in one file, as `cat a.gz b.gz` makes.
    content = source.read_bytes()
    members = gzip.compress(content[:50]) + gzip.compress(content[50:])
    (tmp_path / "in.jsonl.gz").write_bytes(members)
    assert run(capsys, "tokenize", tmp_path / "*.gz", *tail, tmp_path / "gz")[0] == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    assert run(capsys, "tokenize", "-", *tail, tmp_path / "stdin")[0] == 0
    assert bytes_of(tmp_path / "plain") == bytes_of(tmp_path / "gz") == bytes_of(tmp_path / "stdin")


def test_damaged_gz_is_refused(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = gzip.compress(random.Random(0).randbytes(3000).hex().encode())
    (tmp_path / "x.gz").write_bytes(content[:-20])
    status, _, err = run(
        capsys, "tokenize", tmp_path / "x.gz", "--tokenizer", small_model, "--out", tmp_path / "c"
    )
    assert status == 2
    assert "x.gz: damaged gzip data" in err
    assert [p.name for p in tmp_path.iterdir()] == ["x.gz"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "cut', "column 14: not JSON: a string is not closed"),
        (b'{"texts": "x"}', 'field "text" is missing'),
        (b'{"text": null}', 'field "text" is null, not a string'),
        (b'{"text": "\\ud800"}', 'field "text" holds half of a surrogate pair'),
        (b'{"text": "\xff"}', "column 11: not UTF-8: byte 0xff"),
    ],
)
@pytest.mark.parametrize("policy", ["stop", "skip", "quarantine"])
def test_bad_lines(
    line: bytes,
    message: str,
    policy: str,
    source: Path,
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    good = source.read_bytes()
    source.write_bytes(good + line + b"\n" + good)
    args = ["--tokenizer", small_model, "--out", tmp_path / "c", "--on-error", policy, "--json"]
    status, stdout, err = run(capsys, "tokenize", source, *args)
    names = {p.name for p in tmp_path.iterdir()} - {"in.jsonl"}
    assert f"in.jsonl:6: {message}" in err
    if policy == "stop":
        assert (status, stdout, names) == (2, "", set())
        assert err.startswith("error: ")
        return
    assert status == 0
    assert json.loads(stdout)["bad_lines"] == 1
    assert json.loads(stdout)["documents"] == 10
    assert f"in.jsonl:6: {message}" in (tmp_path / "c.errors.txt").read_text()
    if policy == "quarantine":
        assert (tmp_path / "c.quarantine").read_bytes() == line + b"\n"
    assert ("c.quarantine" in names) == (policy == "quarantine")


def test_existing_output_is_kept_without_force(
    source: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["tokenize", source, "--tokenizer", small_model, "--out", tmp_path / "c"]
    assert run(capsys, *args)[0] == 0
    before = bytes_of(tmp_path / "c")
    write_jsonl(source, ["other"])
    status, _, err = run(capsys, *args)
    assert status == 2
    assert "--force" in err
    assert bytes_of(tmp_path / "c") == before
    assert run(capsys, *args, "--force")[0] == 0
    assert bytes_of(tmp_path / "c") != before


def test_a_fast_encoder_that_differs_is_not_used(
    source: Path,
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = load_tokenizer(small_model)

    def shifted(texts: list[str]) -> list[list[int]]:
        return [[i ^ 1 for i in ids] for ids in real.reference.encode(texts)]

    class Shifted:
        def __getattr__(self, name: str) -> Any:
            if name == "reference":
                return Reference(encode=shifted, decode=real.reference.decode)
            return getattr(real, name)

    monkeypatch.setattr(tokenize_module, "load_tokenizer", lambda path, **_: Shifted())
    args = ["tokenize", source, "--tokenizer", small_model, "--out", tmp_path / "c", "--json"]
    status, stdout, err = run(capsys, *args)
    assert status == 0
    assert "differs from the reference" in err
    assert json.loads(stdout)["encoder"] == "reference"
    ids = IndexedDataset(tmp_path / "c_text_document")[0].tolist()
    assert ids == shifted([TEXTS[0]])[0]


@pytest.mark.parametrize("name", ["in.jsonl", "in.jsonl.gz", "-"])
def test_samples_of_every_kind_of_input_are_compared(
    name: str,
    source: Path,
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = source.read_bytes()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(content))
    path = source if name == "in.jsonl" else "-" if name == "-" else tmp_path / name
    seen: dict[str, list[str]] = {}

    def compare(encoder: Any, tokenizer: Any, name: str, texts: list[str]) -> int:
        seen.setdefault(name, []).extend(texts)
        return len(texts)

    monkeypatch.setattr(tokenize_module, "compare_texts", compare)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    args = ["tokenize", path, "--tokenizer", small_model, "--out", tmp_path / "c", "--json"]
    status, stdout, _ = run(capsys, *args, "--verify-sample", "3")
    assert status == 0
    assert len(seen) == 1
    (texts,) = seen.values()
    assert json.loads(stdout)["verified_samples"] == len(texts) > 0
    assert set(texts) <= set(TEXTS)
    if name != "in.jsonl":
        assert texts == [json.loads(line)["text"] for line in content.splitlines()[:3]]


def test_a_difference_found_when_all_is_built_starts_again(
    source: Path,
    small_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    built = threading.Event()
    real_build = tokenize_module.DatasetBuilder

    class Announcing:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._builder = real_build(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._builder, name)

        def finish(self) -> Any:
            positions = self._builder.finish()
            built.set()
            return positions

    def late(*_: object) -> int:
        assert built.wait(30)
        raise EncoderDiffersError("in.jsonl: differs")

    monkeypatch.setattr(tokenize_module, "DatasetBuilder", Announcing)
    monkeypatch.setattr(tokenize_module, "compare_texts", late)
    args = ["tokenize", source, "--tokenizer", small_model, "--append-eod", "--json"]
    status, stdout, err = run(capsys, *args, "--out", tmp_path / "late")
    assert status == 0
    assert "differs" in err
    assert json.loads(stdout)["encoder"] == "reference"
    run(capsys, *args, "--out", tmp_path / "plain", "--encoder", "reference")
    assert bytes_of(tmp_path / "late") == bytes_of(tmp_path / "plain")


def test_a_failing_encoder_leaves_nothing(
    source: Path, small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(texts: list[str]) -> list[list[int]]:
        raise RuntimeError("the library failed")

    loaded = load_tokenizer(small_model)
    loaded.__dict__["reference"] = Reference(encode=broken, decode=str)
    monkeypatch.setattr(tokenize_module, "load_tokenizer", lambda path, **_: loaded)
    options = tokenize_module.TokenizeOptions(
        inputs=(str(source),),
        tokenizer=small_model,
        out=tmp_path / "c",
        workers=3,
        reference_only=True,
    )
    with pytest.raises(RuntimeError, match="the library failed"):
        tokenize_module.tokenize(options)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_training_a_tokenizer_is_deterministic(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(source, [f"{t} {u}" for t in TEXTS for u in TEXTS])
    for name in ("a.model", "b.model"):
        args = ["train-tokenizer", source, "--vocab-size", "310", "--out", tmp_path / name]
        assert run(capsys, *args)[0] == 0
    assert (tmp_path / "a.model").read_bytes() == (tmp_path / "b.model").read_bytes()
    status, _, err = run(
        capsys, "train-tokenizer", source, "--vocab-size", "9000", "--out", tmp_path / "c.model"
    )
    assert status == 2
    assert "smaller --vocab-size" in err
    assert not (tmp_path / "c.model").exists()


def test_verify_finds_damage(
    source: Path, small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["tokenize", source, "--tokenizer", small_model, "--out", tmp_path / "c"]
    assert run(capsys, *args)[0] == 0
    prefix = tmp_path / "c_text_document"
    assert verify(prefix).ok
    assert run(capsys, "verify", prefix)[0] == 0
    path = tmp_path / "c_text_document.bin"
    good = path.read_bytes()
    rng = random.Random(0)
    for _ in range(100):
        data = bytearray(good)
        data[rng.randrange(len(data))] ^= rng.randint(1, 255)
        path.write_bytes(data)
        assert any(str(path) in problem for problem in verify(prefix).problems)
    path.write_bytes(b"\xff\xff" + good[2:])
    status, stdout, _ = run(capsys, "verify", prefix, "--json")
    assert status == 1
    assert "byte 0: id 65535 is not in the vocabulary" in json.loads(stdout)["problems"][0]
