"""Merging, and Megatron's spelling of the tokenize command."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from fastllm_data import IndexedDataset, IndexedDatasetWriter, UserError
from fastllm_data.__main__ import main
from fastllm_data.merge import merge
from fastllm_data.tokenize import TokenizeOptions, tokenize

TEXTS = ["one fox", "", "two foxes\n世界", "three", "", "naïve " * 50, "seven"]


def lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def make(path: Path, model: Path, out: Path) -> Path:
    tokenize(TokenizeOptions(inputs=(str(path),), tokenizer=model, out=out, append_eod=True))
    return out.with_name(out.name + "_text_document")


@pytest.mark.parametrize("cuts", [(0,), (3,), (1, 2, 6), (7,)])
def test_merged_parts_equal_the_whole(
    cuts: tuple[int, ...], small_model: Path, tmp_path: Path
) -> None:
    whole = make(lines(tmp_path / "all.jsonl", TEXTS), small_model, tmp_path / "all")
    edges = [0, *cuts, len(TEXTS)]
    parts = [
        make(lines(tmp_path / f"{i}.jsonl", TEXTS[a:b]), small_model, tmp_path / f"p{i}")
        for i, (a, b) in enumerate(itertools.pairwise(edges))
    ]
    merge(parts, tmp_path / "merged")
    for suffix in (".bin", ".idx"):
        merged = (tmp_path / f"merged{suffix}").read_bytes()
        assert merged == whole.with_name(whole.name + suffix).read_bytes()


def test_merge_refuses(tmp_path: Path) -> None:
    for name, dtype in (("a", "uint16"), ("b", "int32")):
        with IndexedDatasetWriter(tmp_path / name, dtype) as writer:
            writer.add([1, 2])
            writer.end_document()
    with pytest.raises(UserError, match="different token types: int32, uint16"):
        merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(UserError, match="exists"):
        merge([tmp_path / "a"], tmp_path / "b")
    merge([tmp_path / "a", tmp_path / "a"], tmp_path / "b", force=True)
    assert IndexedDataset(tmp_path / "b").tokens.tolist() == [1, 2, 1, 2]
    assert not list(tmp_path.glob("*.merging"))


def test_megatron_spelling(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = lines(tmp_path / "all.jsonl", TEXTS)
    whole = make(source, small_model, tmp_path / "all")
    args = ["preprocess", "--input", str(source), "--output-prefix", str(tmp_path / "m")]
    kind = ["--tokenizer-type", "GPTSentencePieceTokenizer"]
    tail = ["--dataset-impl", "mmap", "--append-eod", "--workers", "2", "--json-keys", "text"]
    assert main([*args, *kind, *tail, "--tokenizer-model", str(small_model)]) == 0
    for suffix in (".bin", ".idx"):
        made = (tmp_path / f"m_text_document{suffix}").read_bytes()
        assert made == whole.with_name(whole.name + suffix).read_bytes()
    capsys.readouterr()
    assert main([*args, *kind, *tail]) == 2
    assert "needs --tokenizer-model" in capsys.readouterr().err
    assert main([*args, "--tokenizer-type", "GPT2BPETokenizer"]) == 2
    assert "needs --vocab-file and --merge-file" in capsys.readouterr().err
