"""Checkpoints that other projects' programs wrote, into our formats and back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from sample_checkpoints import Convert, same
from test_run_formats import weights

from fastllm_convert.arrays import Array
from fastllm_convert.files.torch_zip import read_torch


@pytest.mark.shared
def test_reference_meta_shards(golden: Path, tmp_path: Path, convert: Convert) -> None:
    """Both ways, against transformers' converter and against the original shards."""
    cases = sorted(golden.glob("*/meta"))
    assert len(cases) >= 6
    for case in cases:
        name = case.parent.name
        convert("run", case, tmp_path / f"{name}-hf", "--to", "hf")
        expected = weights(case.parent / "hf")
        found = weights(tmp_path / f"{name}-hf")
        if name.startswith("llama1_fp16"):  # that script casts fp16 to bf16; we keep the type
            found = {n: t.bfloat16() for n, t in found.items()}
        same(found, expected)
        shards = sorted(case.glob("*.pth"))
        size = ("--to", "meta", "--tp", str(len(shards)))
        convert("run", tmp_path / f"{name}-hf", tmp_path / f"{name}-meta", *size)
        for shard in shards:
            original = torch.load(shard)
            original.pop("rope.freqs", None)
            same(torch.load(tmp_path / f"{name}-meta" / shard.name), original)


def leaves(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for key, item in value.items() for k, v in leaves(item, f"{prefix}.{key}").items()}


def stored(array: Array) -> tuple[tuple[int, ...], str, bytes]:
    (box,) = array.boxes()
    assert box.file is not None
    with box.file.path.open("rb") as file:
        file.seek(box.offset)
        return array.shape, array.dtype.code, file.read(array.nbytes)


@pytest.mark.shared
def test_reference_megatron_files(golden: Path, tmp_path: Path, convert: Convert) -> None:
    """Both ways: what Megatron-LM's own converters wrote, ``_extra_state`` entries too."""
    cases = sorted(golden.glob("*/megatron_*"))
    assert len(cases) >= 11
    for index, case in enumerate(cases):
        hf = case.parent / "hf"
        legacy = "legacy" in case.name
        out = tmp_path / f"{index}-hf"
        convert("run", case, out, "--to", "hf", "--config", hf)
        expected = {n: t.half() if legacy else t for n, t in weights(hf).items()}
        same(weights(out), expected)
        tp, pp = re.findall(r"tp(\d)_pp(\d)", case.name)[0]
        options = ["--tp", tp, "--pp", pp, "--megatron-layout", "legacy" if legacy else "core"]
        options += ["--dtype", "fp16"] if legacy else []  # that script forces fp16
        options += ["--vocab-pad", "1"] if "llama3" in case.parent.name else []
        written = tmp_path / f"{index}-mg"
        convert("run", hf, written, "--to", "megatron", *options)
        for file in case.glob("iter_*/*/*.pt"):
            theirs = leaves(read_torch(file).entries["model"])
            ours = leaves(read_torch(written / file.relative_to(case)).entries["model"])
            assert ours.keys() == theirs.keys(), file
            for name, value in theirs.items():
                if isinstance(value, Array):
                    mine = ours[name]
                    assert isinstance(mine, Array)
                    assert stored(mine) == stored(value), (file, name)


@pytest.mark.shared
@pytest.mark.parametrize("kind", ["model", "master"])
def test_reference_megatron_deepspeed(
    golden: Path, tmp_path: Path, convert: Convert, kind: str
) -> None:
    cases = sorted(golden.glob("*/mds_*"))
    assert len(cases) >= 3
    for index, case in enumerate(cases):
        hf = case.parent / "hf"
        out = tmp_path / str(index)
        convert("run", case, out, "--to", "hf", "--config", hf, "--weights", kind)
        if "step0" in case.name:  # untrained: exactly the Hugging Face weights
            original = weights(hf)
            same(
                weights(out), {n: t.float() if kind == "master" else t for n, t in original.items()}
            )
        elif kind == "master":
            convert("run", case, tmp_path / "model", "--to", "hf", "--config", hf)
            same(weights(tmp_path / "model"), {n: t.bfloat16() for n, t in weights(out).items()})


@pytest.mark.shared
def test_reference_torch_dist_and_universal(golden: Path, tmp_path: Path, convert: Convert) -> None:
    (dist,) = golden.glob("*/mcore_dist_tp2_pp1")
    convert("run", dist, tmp_path / "dist", "--to", "hf", "--config", dist.parent / "hf")
    same(weights(tmp_path / "dist"), weights(dist.parent / "hf"))
    universal = golden / "ds_zero2_bf16" / "universal"
    convert("run", universal, tmp_path / "u", "--to", "hf", "--config", universal.parent)
    same(weights(tmp_path / "u"), weights(universal.parent / "fp32_zero_to_fp32"))
