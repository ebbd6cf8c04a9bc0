"""Hugging Face in, Hugging Face out: every family, shards, casts, configs for both dialects."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sample_checkpoints import Convert, hf_tensors, random_tensors, same, tiny_spec, write_hf

from fastllm_planner.arch import MoeSpec, read_hf_config, to_hf_config

FAMILIES = {
    "llama": tiny_spec(),
    "llama-tied": tiny_spec(tied_embeddings=True),
    "llama-bias": tiny_spec(qkv_bias=True, attention_out_bias=True, mlp_bias=True),
    "mistral": tiny_spec(family="mistral", head_dim=16, sliding_window=8),
    "qwen2": tiny_spec(family="qwen2", qkv_bias=True),
    "qwen3": tiny_spec(family="qwen3", qk_norm=True),
    "gpt2": tiny_spec(
        family="gpt2", kv_heads=4, ffn_hidden=128, mlp="gelu", norm="layernorm",
        position="learned", qkv_bias=True, attention_out_bias=True, mlp_bias=True,
        tied_embeddings=True,
    ),
    "baichuan": tiny_spec(family="baichuan", kv_heads=4, position="alibi", norm_head=True),
    "mixtral": tiny_spec(family="mixtral", moe=MoeSpec(4, 2, 48)),
}  # fmt: skip


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_out_as_it_went_in(
    tmp_path: Path, convert: Convert, family: str
) -> None:
    spec = FAMILIES[family]
    canonical = random_tensors(spec, torch.bfloat16)
    source = write_hf(tmp_path / "src", spec, canonical)
    done = convert("run", source, tmp_path / "dst", "--to", "hf", "--shard-size", "10KB")
    assert f"Hugging Face {spec.family}" in done.stderr
    same(load_folder(tmp_path / "dst"), hf_tensors(spec, canonical))
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(hf_tensors(spec, canonical))
    written = load_folder(tmp_path / "dst")
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in written.values())
    assert read_hf_config(tmp_path / "dst") == read_hf_config(source)
    assert convert("verify", source, tmp_path / "dst").stdout.startswith("equal")


def test_one_file_is_byte_identical_to_the_librarys(tmp_path: Path, convert: Convert) -> None:
    spec = tiny_spec()
    source = write_hf(tmp_path / "src", spec, random_tensors(spec))
    convert("run", source, tmp_path / "dst", "--to", "hf")
    a, b = (f / "model.safetensors" for f in (source, tmp_path / "dst"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("target", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_casts_round_as_torch_does(
    tmp_path: Path, convert: Convert, stored: torch.dtype, target: str
) -> None:
    spec = tiny_spec()
    canonical = random_tensors(spec, stored)
    canonical["model.norm.weight"][:6] = torch.tensor(
        [0.0, -0.0, float("inf"), 1e-7, 3.140625, 65504.0]
    ).to(stored)
    source = write_hf(tmp_path / "src", spec, canonical)
    convert("run", source, tmp_path / "dst", "--to", "hf", "--dtype", target)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[target]
    same(load_folder(tmp_path / "dst"), {n: t.to(dtype) for n, t in canonical.items()})
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_overflow_is_reported(tmp_path: Path, convert: Convert) -> None:
    spec = tiny_spec()
    canonical = random_tensors(spec, torch.bfloat16)
    canonical["model.norm.weight"][3] = 1e30
    source = write_hf(tmp_path / "src", spec, canonical)
    done = convert("run", source, tmp_path / "dst", "--to", "hf", "--dtype", "fp16", "--json")
    assert json.loads(done.stdout)["overflowed"] == 1
    assert "infinite" in done.stderr


def test_transformers_loads_it_and_computes_the_same(tmp_path: Path, convert: Convert) -> None:
    transformers = pytest.importorskip("transformers")
    spec = tiny_spec()
    source = write_hf(tmp_path / "src", spec, random_tensors(spec))
    convert("run", source, tmp_path / "dst", "--to", "hf", "--shard-size", "20KB")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dst", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    original = transformers.AutoModelForCausalLM.from_pretrained(source)
    ids = torch.arange(12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, original(ids).logits)


def test_pytorch_bin_with_an_index(tmp_path: Path, convert: Convert) -> None:
    spec = tiny_spec()
    canonical = random_tensors(spec)
    source = tmp_path / "src"
    source.mkdir()
    names = list(canonical)
    files = {
        "pytorch_model-00001-of-00002.bin": names[:9],
        "pytorch_model-00002-of-00002.bin": names[9:],
    }
    for file, held in files.items():
        torch.save({n: canonical[n] for n in held}, source / file)
    weight_map = {n: file for file, held in files.items() for n in held}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (source / "config.json").write_text(json.dumps(to_hf_config(spec)))
    convert("run", source, tmp_path / "dst", "--to", "hf")
    same(load_folder(tmp_path / "dst"), canonical)


def test_config_speaks_both_dialects_and_keeps_the_rest(tmp_path: Path, convert: Convert) -> None:
    spec = tiny_spec()
    source = write_hf(tmp_path / "src", spec, random_tensors(spec, torch.bfloat16))
    config = to_hf_config(spec)
    for key in ("rope_theta", "rope_scaling"):
        del config[key]
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    config["rope_parameters"] = {**scaling, "rope_theta": 5e5}
    config |= {"attention_dropout": 0.25, "eos_token_id": [2, 7], "pad_token_id": 3}
    (source / "config.json").write_text(json.dumps(config))
    convert("run", source, tmp_path / "dst", "--to", "hf")
    written = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == scaling
    assert written["rope_parameters"] == {**scaling, "rope_theta": 5e5}
    assert written["torch_dtype"] == written["dtype"] == "bfloat16"
    assert written["attention_dropout"] == 0.25
    assert written["eos_token_id"] == [2, 7]
    assert written["pad_token_id"] == 3


def test_tied_head_in_the_file(
    tmp_path: Path, convert: Convert, refused: Callable[..., str]
) -> None:
    spec = tiny_spec(tied_embeddings=True)
    canonical = random_tensors(spec)
    embedding = canonical["model.embed_tokens.weight"]
    source = write_hf(tmp_path / "src", spec, canonical)
    held = {**canonical, "lm_head.weight": embedding.clone()}
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    convert("run", source, tmp_path / "dst", "--to", "hf")
    same(load_folder(tmp_path / "dst"), canonical)
    held["lm_head.weight"][5, 5] += 1
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    assert "tied" in refused("run", source, tmp_path / "other", "--to", "hf")
    assert not (tmp_path / "other").exists()


def damaged(tmp_path: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    spec = tiny_spec()
    canonical = random_tensors(spec)
    source = write_hf(tmp_path / "src", spec, canonical)
    edit(canonical)
    save_file(canonical, source / "model.safetensors", metadata={"format": "pt"})
    return source


@pytest.mark.parametrize(
    ("edit", "needle"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "missing"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(2)}), "unexpected"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(31)}), "shape"),
        (lambda t: t.update({"model.norm.weight": torch.zeros(32, 1)}), "shape"),
    ],
)
def test_wrong_tensors_write_nothing(
    tmp_path: Path,
    refused: Callable[..., str],
    edit: Callable[[dict[str, torch.Tensor]], object],
    needle: str,
) -> None:
    source = damaged(tmp_path, edit)
    message = refused("run", source, tmp_path / "dst", "--to", "hf")
    assert needle in message
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


@pytest.mark.parametrize(
    ("where", "needle"),
    [
        ("../elsewhere.safetensors", "outside"),
        ("/etc/passwd", "outside"),
        ("..", "not a file name"),
        ("model-9.safetensors", "not there"),
        ("config.json", "not a weights file"),
    ],
)
def test_an_index_stays_in_its_folder(
    tmp_path: Path, refused: Callable[..., str], where: str, needle: str
) -> None:
    spec = tiny_spec()
    source = write_hf(tmp_path / "src", spec, random_tensors(spec))
    (source / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": where}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    assert needle in refused("run", source, tmp_path / "dst", "--to", "hf")
    assert not (tmp_path / "dst").exists()


def test_verify_says_no(tmp_path: Path, convert: Convert) -> None:
    spec = tiny_spec()
    canonical = random_tensors(spec)
    first = write_hf(tmp_path / "a", spec, canonical)
    canonical["model.norm.weight"][7] += 0.5
    second = write_hf(tmp_path / "b", spec, canonical)
    done = convert("verify", first, second, "--json", status=1)
    result = json.loads(done.stdout)
    assert not result["equal"]
    assert result["differences"] == ["model.norm.weight: differs by up to 0.5"]
    assert json.loads(convert("verify", first, second, "--json", "--tolerance", "0.6").stdout)[
        "equal"
    ]
    convert("verify", first, second, "--tolerance", "0.4", status=1)


def test_inspect_and_plan_write_nothing(tmp_path: Path, convert: Convert) -> None:
    spec = tiny_spec()
    canonical = random_tensors(spec)
    source = write_hf(tmp_path / "src", spec, canonical)
    total = sum(t.numel() for t in canonical.values())
    found = json.loads(convert("inspect", source, "--json").stdout)
    assert found["parameters"] == total
    assert found["bytes"] == total * 4
    planned = json.loads(convert("plan", source, "--to", "hf", "--dtype", "bf16", "--json").stdout)
    assert planned["bytes_read"] == total * 4
    weights = [f for f in planned["files"] if f["path"].endswith(".safetensors")]
    assert total * 2 < weights[0]["bytes"] < total * 2 + 8000
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


def test_existing_target_is_kept_unless_forced(
    tmp_path: Path, convert: Convert, refused: Callable[..., str]
) -> None:
    spec = tiny_spec()
    source = write_hf(tmp_path / "src", spec, random_tensors(spec))
    target = tmp_path / "dst"
    target.mkdir()
    convert("run", source, target, "--to", "hf")  # an empty folder is free
    (target / "mine.txt").write_text("x")
    assert "--force" in refused("run", source, target, "--to", "hf")
    assert (target / "mine.txt").exists()
    convert("run", source, target, "--to", "hf", "--force")
    assert not (target / "mine.txt").exists()
    other = tmp_path / "documents"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    assert "not a checkpoint" in refused("run", source, other, "--to", "hf", "--force")
    assert "source" in refused("run", source, source / "inner", "--to", "hf")
    assert "source" in refused("run", source, tmp_path, "--to", "hf", "--force")
    assert {p.name for p in tmp_path.iterdir()} == {"src", "dst", "documents"}


def test_more_files_than_a_process_may_open_by_default(tmp_path: Path, convert: Convert) -> None:
    import resource

    spec = tiny_spec(layers=12)
    source = write_hf(tmp_path / "src", spec, random_tensors(spec))
    convert("run", source, tmp_path / "many", "--to", "hf", "--shard-size", "1KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 70
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        convert("run", tmp_path / "many", tmp_path / "one", "--to", "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    same(load_folder(tmp_path / "one"), load_folder(source))


@pytest.mark.shared
@pytest.mark.parametrize(
    "case",
    ["hf_llama_sharded", "hf_llama_small", "hf_qwen2", "hf_mistral", "hf_gpt2", "hf_mixtral"],
)
def test_reference_folders(golden: Path, tmp_path: Path, convert: Convert, case: str) -> None:
    """Files written by transformers come out with the same tensors, and the same logits."""
    transformers = pytest.importorskip("transformers")
    source = golden / case / "hf"
    convert("run", source, tmp_path / "dst", "--to", "hf", "--shard-size", "150KB")
    same(load_folder(tmp_path / "dst"), load_folder(source))
    ids = torch.from_numpy(np.load(golden / case / "input_ids.npy"))
    logits = []
    for folder in (tmp_path / "dst", source):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)
    # The stored ones come from another processor: matrix products sum in another order there.
    expected = torch.from_numpy(np.load(golden / case / "logits_hf.npy"))
    assert float((logits[0] - expected).abs().max()) < 1e-4
