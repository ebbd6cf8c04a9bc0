"""split, sample, merge, inspect, stats, and Megatron's spelling with all its options."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest

from fastllm_data import IndexedDataset, IndexedDatasetWriter, UserError
from fastllm_data.__main__ import main
from fastllm_data.merge import merge
from fastllm_data.subset import split_by_parts, split_by_shares
from fastllm_data.tokenize import TokenizeOptions, tokenize
from fastllm_data.tokenizer import load_tokenizer
from fastllm_data.verify import verify

TEXTS = [f"fox {i} " * (i % 7) for i in range(101)]


@pytest.fixture
def prefix(small_model: Path, tmp_path: Path) -> Path:
    """A dataset of 101 documents, some empty, some of several sequences."""
    rows = [{"text": [t, "a dog"] if i % 5 == 0 else t} for i, t in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = str(tmp_path / "in.jsonl")
    tokenize(TokenizeOptions((source,), small_model, tmp_path / "all", append_eod=True))
    return tmp_path / "all_text_document"


def content(prefix: Path) -> tuple[bytes, bytes]:
    idx, data = (prefix.with_name(prefix.name + suffix) for suffix in (".idx", ".bin"))
    return idx.read_bytes(), data.read_bytes()


def run(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    status = main([str(arg) for arg in args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def documents(prefix: Path) -> list[list[int]]:
    ds = IndexedDataset(prefix)
    return [ds.document(d).tolist() for d in range(ds.documents)]


@pytest.mark.parametrize("how", [("--shares", "949,50,1"), ("--shares", "1,1"), ("--parts", "4")])
def test_split_and_merge_give_the_whole_back(
    how: tuple[str, str], prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["split", prefix, *how, "--out", tmp_path / "s"]
    status, stdout, _ = run(capsys, *args, "--json")
    assert status == 0
    made = [Path(row["output"]) for row in json.loads(stdout)["outputs"]]
    assert all(verify(part).ok for part in made)
    assert [d for part in made for d in documents(part)] == documents(prefix)
    merge(made, tmp_path / "back")
    assert content(tmp_path / "back") == content(prefix)
    assert verify(tmp_path / "back").ok
    status, _, err = run(capsys, *args)
    assert status == 2
    assert "--force" in err
    assert run(capsys, *args, "--force")[0] == 0


def test_shares_are_rounded_as_megatron_does(prefix: Path) -> None:
    ds = IndexedDataset(prefix)
    assert split_by_shares(ds, [949, 50, 1]) == {"train": (0, 96), "valid": (96, 101)}
    assert split_by_shares(ds, [0, 1]) == {"valid": (0, 101)}
    for wrong in ([], [0], [1, -1], [1, 1, 1, 1]):
        with pytest.raises(UserError):
            split_by_shares(ds, wrong)


def test_parts_have_about_equal_tokens(prefix: Path) -> None:
    ds = IndexedDataset(prefix)
    for parts in (1, 2, 7, 100, 101):
        ranges = list(split_by_parts(ds, parts).values())
        assert len(ranges) == parts
        assert [a for a, _ in ranges] == [0, *(b for _, b in ranges[:-1])]
        assert ranges[-1][1] == 101
        assert all(a < b for a, b in ranges)
        sizes = [sum(len(ds.document(d)) for d in range(a, b)) for a, b in ranges]
        longest = max(len(ds.document(d)) for d in range(101))
        assert max(sizes) <= len(ds.tokens) / parts + longest
    with pytest.raises(UserError, match="101 documents cannot make 102 parts"):
        split_by_parts(ds, 102)


def test_sample(prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["sample", prefix, "--count", "30"]
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(capsys, *args, "--seed", str(seed), "--out", tmp_path / name)[0] == 0
    assert content(tmp_path / "a") == content(tmp_path / "b") != content(tmp_path / "c")
    assert verify(tmp_path / "a").ok
    drawn, everything = documents(tmp_path / "a"), iter(documents(prefix))
    assert len(drawn) == 30
    assert all(document in everything for document in drawn)  # in the same order
    assert run(capsys, "sample", prefix, "--tokens", "500", "--out", tmp_path / "d")[0] == 0
    longest = max(map(len, documents(prefix)))
    assert 500 <= len(IndexedDataset(tmp_path / "d").tokens) < 500 + longest
    assert run(capsys, "sample", prefix, "--count", "101", "--out", tmp_path / "e")[0] == 0
    assert content(tmp_path / "e") == content(prefix)
    for wrong in (
        ["--count", "102"],
        ["--tokens", "99999999"],
        [],
        ["--count", "1", "--tokens", "1"],
    ):
        assert run(capsys, "sample", prefix, *wrong, "--out", tmp_path / "f")[0] == 2
    assert not (tmp_path / "f.idx").exists()


def test_merge_joins_sidecars(prefix: Path, small_model: Path, tmp_path: Path) -> None:
    merge([prefix, prefix], tmp_path / "two")
    meta = json.loads((tmp_path / "two.meta.json").read_text())
    assert meta["counts"]["documents"] == 202
    assert meta["dataset"] == {"documents": 202, "sequences": 2 * 107, "tokens": 2 * tokens(prefix)}
    assert [source["file"] for source in meta["inputs"]] == [str(tmp_path / "in.jsonl")] * 2
    assert verify(tmp_path / "two").ok
    with IndexedDatasetWriter(tmp_path / "bare") as writer:
        writer.add([1, 2])
        writer.end_document()
    merge([prefix, tmp_path / "bare"], tmp_path / "two", force=True)
    assert not (tmp_path / "two.meta.json").exists()
    other = prefix.with_name("other")
    for suffix in (".bin", ".idx", ".meta.json"):
        other.with_name(f"other{suffix}").write_bytes(
            prefix.with_name(prefix.name + suffix).read_bytes()
        )
    path = prefix.with_name("other.meta.json")
    path.write_text(path.read_text().replace(load_tokenizer(small_model).sha256, "0" * 64))
    with pytest.raises(UserError, match="made with different tokenizers"):
        merge([prefix, other], tmp_path / "three")


def tokens(prefix: Path) -> int:
    return len(IndexedDataset(prefix).tokens)


def test_inspect_decodes_with_the_recorded_tokenizer(
    prefix: Path, small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, stdout, _ = run(capsys, "inspect", prefix, "--document", "3", "--json")
    assert status == 0
    assert json.loads(stdout)["text"] == TEXTS[3]
    meta = prefix.with_name(prefix.name + ".meta.json")
    digest = load_tokenizer(small_model).sha256
    meta.write_text(meta.read_text().replace(digest, "0" * 64))
    assert "text" not in json.loads(run(capsys, "inspect", prefix, "--json")[1])
    args = ("inspect", prefix, "--tokenizer", small_model, "--json")
    assert "text" in json.loads(run(capsys, *args)[1])


def test_verify_says_what_it_found(
    prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    idx = prefix.with_name(prefix.name + ".idx")
    good = idx.read_bytes()
    idx.write_bytes(good + bytes(107))  # as many bytes as sequences
    status, stdout, _ = run(capsys, "verify", prefix)
    assert status == 1
    assert f"wrong: {idx}: byte {len(good)}: 107 bytes after the index" in stdout
    prefix.with_name(prefix.name + ".meta.json").unlink()
    assert run(capsys, "verify", prefix)[0] == 1
    assert run(capsys, "verify", prefix, "--modes")[0] == 0
    idx.write_bytes(good)
    assert run(capsys, "verify", prefix, "--vocab-size", "300")[0] == 1
    idx.unlink()
    assert run(capsys, "verify", prefix)[0] == 2


def test_stats_plot(prefix: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    svg = tmp_path / "x.svg"
    status, stdout, _ = run(capsys, "stats", prefix, "--plot", svg, "--json")
    assert status == 0
    bins = json.loads(stdout)["histogram"]
    root = ET.fromstring(svg.read_text())
    space = "{http://www.w3.org/2000/svg}"
    titles = [title.text for title in root.iter(f"{space}title")]
    assert titles == [
        f"{b['from']:,} to {b['to']:,} tokens: {b['documents']:,} documents" for b in bins
    ]
    bars = [rect for rect in root.iter(f"{space}rect") if rect.find(f"{space}title") is not None]
    heights = np.array([float(rect.attrib["height"]) for rect in bars])
    counts = np.array([b["documents"] for b in bins])
    assert np.allclose(heights / heights.max(), counts / counts.max(), atol=0.01)
    status, _, err = run(capsys, "stats", prefix, "--plot", tmp_path / "x.png")
    assert status == 2
    assert "only .svg" in err


@pytest.fixture
def punkt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sentence data of NLTK with one abbreviation; the real one is not on PyPI."""
    nltk = pytest.importorskip("nltk", reason="pip install 'fastllm-data[sentences]'")
    folder = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    folder.mkdir(parents=True)
    (folder / "abbrev_types.txt").write_text("dr\n")
    for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
        (folder / name).touch()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])


@pytest.mark.usefixtures("punkt")
def test_megatron_spelling_with_every_option(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"text": "A fox met Dr. Dog.  Who\nwas it? 世界!", "title": "One. Two."},
        {"text": "", "title": ["as. is", "b"]},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = f"--input {tmp_path}/in.jsonl --json-keys text title --tokenizer-type"
    args += f" GPTSentencePieceTokenizer --tokenizer-model {small_model} --append-eod"
    args += " --dataset-impl mmap --workers 2 --partitions 1 --log-interval 10"
    command = ["preprocess", *args.split(), "--output-prefix"]
    assert run(capsys, *command, tmp_path / "d", "--keep-sequential-samples")[0] == 0
    assert IndexedDataset(tmp_path / "d_title_document").documents == 2
    assert run(capsys, *command, tmp_path / "s", "--split-sentences", "--lang", "english")[0] == 0
    encode = load_tokenizer(small_model).reference.encode
    made = IndexedDataset(tmp_path / "s_text_sentence")
    ids = encode(["A fox met Dr. Dog.", "Who\nwas it?", "世界!"])
    assert [made[i].tolist() for i in range(3)] == [*ids[:2], [*ids[2], 2]]
    assert made.boundaries.tolist() == [0, 3, 3]
    titles = IndexedDataset(tmp_path / "s_title_sentence")
    assert titles.boundaries.tolist() == [0, 2, 4]
    more = ["--split-sentences", "--keep-newlines"]
    assert run(capsys, *command, tmp_path / "n", *more)[0] == 0
    kept = IndexedDataset(tmp_path / "n_text_sentence")
    assert kept[0].tolist() == encode(["A fox met Dr. Dog.  "])[0]
    status, _, err = run(capsys, *command, tmp_path / "x", "--split-sentences", "--lang", "klingon")
    assert status == 2
    assert "NLTK has no sentence data for 'klingon'" in err
