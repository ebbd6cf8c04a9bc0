"""Mixtures of experts in Megatron's and Megatron-DeepSpeed's files, expert parallelism included."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sample_checkpoints import Convert, Tensors, random_tensors, same, tiny_spec, write_hf

from fastllm_planner.arch import ArchSpec, MoeSpec

MIXTRAL = tiny_spec(family="mixtral", layers=4, kv_heads=4, vocab=97, moe=MoeSpec(4, 2, 48))
QWEN3 = tiny_spec(
    family="qwen3_moe", layers=4, kv_heads=4, qk_norm=True, tied_embeddings=True,
    moe=MoeSpec(6, 2, 16, first_dense_layers=1),
)  # fmt: skip
SPECS = {"mixtral": MIXTRAL, "qwen3_moe": QWEN3}


def source(tmp_path: Path, spec: ArchSpec) -> Path:
    return write_hf(tmp_path / "src", spec, random_tensors(spec, torch.bfloat16))


def weights(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


def state(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=False)


def edit_state(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    found = state(file)
    edit(found)
    torch.save(found, file)


@pytest.mark.parametrize("layout", ["core", "core-te", "legacy"])
@pytest.mark.parametrize(
    ("tp", "pp", "ep"), [(1, 1, 1), (1, 1, 2), (2, 1, 2), (2, 2, 1), (2, 2, 2)]
)
@pytest.mark.parametrize("family", list(SPECS))
def test_megatron_and_back(
    tmp_path: Path, convert: Convert, family: str, tp: int, pp: int, ep: int, layout: str
) -> None:
    src = source(tmp_path, SPECS[family])
    size = ["--tp", str(tp), "--pp", str(pp), "--ep", str(ep), "--megatron-layout", layout]
    convert("run", src, tmp_path / "mg", "--to", "megatron", *size)
    found = convert("run", tmp_path / "mg", tmp_path / "hf", "--to", "hf")
    assert ("ep 2" in found.stderr) == (ep == 2)
    same(weights(tmp_path / "hf"), weights(src))
    assert len(list((tmp_path / "mg").glob("iter_*/*/model_optim_rng.pt"))) == tp * pp * ep


def test_expert_files_by_hand(tmp_path: Path, convert: Convert) -> None:
    """Folder names, and local expert 1 of expert rank 1 is expert 3; the rest is repeated."""
    src = source(tmp_path, MIXTRAL)
    convert("run", src, tmp_path / "mg", "--to", "megatron", "--tp", "2", "--ep", "2")
    root = tmp_path / "mg" / "iter_0000001"
    names = [f"mp_rank_{t:02d}_{e:03d}" for t in range(2) for e in range(2)]
    assert sorted(p.name for p in root.iterdir()) == names
    original = weights(src)
    experts = "model.layers.2.block_sparse_moe.experts.3."
    gate, up = (original[f"{experts}{w}.weight"] for w in ("w1", "w3"))
    held = state(root / "mp_rank_01_001" / "model_optim_rng.pt")
    fc1 = held["model"]["decoder.layers.2.mlp.experts.local_experts.1.linear_fc1.weight"]
    assert torch.equal(fc1, torch.cat([gate[24:], up[24:]]))
    router = held["model"]["decoder.layers.2.mlp.router.weight"]
    assert torch.equal(router, original["model.layers.2.block_sparse_moe.gate.weight"])
    assert held["args"].expert_model_parallel_size == 2


NORM = "decoder.layers.0.input_layernorm.weight"
FC2 = "decoder.layers.0.mlp.experts.local_experts.0.linear_fc2.weight"


@pytest.mark.parametrize(
    ("rank", "edit", "needle"),
    [
        ("00_001", lambda s: s["model"].pop(FC2), "missing"),
        ("00_001", lambda s: s["model"].update({NORM: s["model"][NORM] + 1}), "differ"),
        ("00_001", lambda s: s["model"].update(extra=torch.zeros(1)), "unexpected"),
        ("00_000", lambda s: setattr(s["args"], "expert_tensor_parallel_size", 1), "split over"),
        ("01_001", None, "expert rank 1 is missing"),
    ],
)
def test_damaged_expert_files(
    tmp_path: Path,
    convert: Convert,
    refused: Callable[..., str],
    rank: str,
    edit: Callable[[dict[str, Any]], object] | None,
    needle: str,
) -> None:
    src = source(tmp_path, MIXTRAL)
    root = tmp_path / "mg"
    convert("run", src, root, "--to", "megatron", "--tp", "2", "--ep", "2")
    file = root / "iter_0000001" / f"mp_rank_{rank}" / "model_optim_rng.pt"
    if edit is None:
        file.unlink()
        file.parent.rmdir()
    else:
        edit_state(file, edit)
    assert needle in refused("run", root, tmp_path / "out", "--to", "hf")
    assert {p.name for p in tmp_path.iterdir()} == {"src", "mg"}


@pytest.mark.parametrize(
    ("to", "needle"),
    [
        (["megatron", "--ep", "3"], "does not divide 4 experts"),
        (["hf", "--ep", "2"], "one file"),
        (["megatron-deepspeed", "--ep", "2"], "file of its own"),
        (["megatron-deepspeed", "--pp", "2"], "pipeline"),
    ],
)
def test_wrong_sizes_are_refused(
    tmp_path: Path, refused: Callable[..., str], to: list[str], needle: str
) -> None:
    src = source(tmp_path, MIXTRAL)
    assert needle in refused("run", src, tmp_path / "out", "--to", *to)
    assert {p.name for p in tmp_path.iterdir()} == {"src"}


@pytest.mark.parametrize("qkv", ["interleaved", "concat"])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("family", list(SPECS))
def test_megatron_deepspeed_and_back(
    tmp_path: Path, convert: Convert, family: str, tp: int, qkv: str
) -> None:
    spec = SPECS[family]
    src = source(tmp_path, spec)
    options = ("--tp", str(tp), "--target-qkv-layout", qkv)
    convert("run", src, tmp_path / "ds", "--to", "megatron-deepspeed", *options)
    convert("run", tmp_path / "ds", tmp_path / "hf", "--to", "hf")
    same(weights(tmp_path / "hf"), weights(src))
    tag = tmp_path / "ds" / "global_step0"
    assert spec.moe is not None
    layers = spec.layers - spec.moe.first_dense_layers
    assert len(list(tag.glob("layer_*_expert_*"))) == layers * spec.moe.experts * tp
    held = state(tag / "layer_1_expert_3_mp_rank_00_model_states.pt")
    layer = 1 + spec.moe.first_dense_layers
    prefix = f"language_model.encoder.layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.3."
    assert set(held) == {f"{prefix}{n}.weight" for n in ("dense_h_to_4h", "dense_4h_to_h")}
    expert = f"model.layers.{layer}." + (
        "block_sparse_moe.experts.3.w2" if family == "mixtral" else "mlp.experts.3.down_proj"
    )
    assert torch.equal(held[f"{prefix}dense_4h_to_h.weight"], weights(src)[f"{expert}.weight"])


def test_split_and_shared_experts_of_megatron_deepspeed(
    tmp_path: Path, convert: Convert, refused: Callable[..., str]
) -> None:
    """``enable_expert_tensor_parallelism``: each tensor rank's files hold its part. Without it some
    codes save an expert once, for rank 0 alone."""
    src = source(tmp_path, MIXTRAL)
    root = tmp_path / "ds"
    convert("run", src, root, "--to", "megatron-deepspeed", "--tp", "2")
    tag = root / "global_step0"
    saved = {f: f.read_bytes() for f in tag.glob("layer_*_mp_rank_01_*")}
    for file in saved:
        file.unlink()
    convert("run", root, tmp_path / "shared", "--to", "hf")
    same(weights(tmp_path / "shared"), weights(src))
    for file, content in saved.items():
        file.write_bytes(content)
    for file in tag.glob("layer_*_expert_*"):
        rank = int("mp_rank_01" in file.name)

        def cut(held: dict[str, Any], rank: int = rank) -> None:
            for name, value in held.items():
                if name.endswith("dense_4h_to_h.weight"):
                    held[name] = value.chunk(2, 1)[rank].clone()
                else:
                    gate, up = value.chunk(2)
                    held[name] = torch.cat([gate.chunk(2)[rank], up.chunk(2)[rank]])

        edit_state(file, cut)
    refused("run", root, tmp_path / "wrong", "--to", "hf")
    for file in tag.glob("mp_rank_*"):
        edit_state(file, lambda s: setattr(s["args"], "enable_expert_tensor_parallelism", True))
    convert("run", root, tmp_path / "hf", "--to", "hf")
    same(weights(tmp_path / "hf"), weights(src))
    next(tag.glob("layer_0_expert_2_*")).unlink()
    assert "missing" in refused("run", root, tmp_path / "short", "--to", "hf")
    assert not (tmp_path / "wrong").exists()


@pytest.mark.parametrize("kind", ["model", "master"])
def test_dense_model_without_pipeline(tmp_path: Path, convert: Convert, kind: str) -> None:
    """``--no-pipeline-parallel``: layer files folded into nested models; masters end to end."""
    spec = tiny_spec(layers=3, kv_heads=4, vocab=97)
    src = source(tmp_path, spec)
    convert("run", src, tmp_path / "layers", "--to", "megatron-deepspeed", "--tp", "2")
    old, tag = tmp_path / "layers" / "global_step0", tmp_path / "ds" / "global_step0"
    tag.mkdir(parents=True)
    (tmp_path / "ds" / "latest").write_text("global_step0")
    for rank in range(2):
        end = f"-model_{rank:02d}-model_states.pt"
        first, *layers, norm, head = (state(old / f"layer_{n:02d}{end}") for n in range(1, 7))
        encoder = {f"layers.{i}.{k}": v for i, held in enumerate(layers) for k, v in held.items()}
        encoder["final_layernorm.weight"] = norm["weight"]
        words, output = first["word_embeddings.weight"], head["lm_head.weight"]
        model = {
            "embedding": {"word_embeddings": {"weight": words}},
            "encoder": encoder,
            "output_layer": {"weight": output},
        }
        flat = {
            "language_model.embedding.word_embeddings.weight": words,
            **{f"language_model.encoder.{k}": v for k, v in encoder.items()},
            "language_model.output_layer.weight": output,
        }
        saved = state(old / f"mp_rank_{rank:02d}_model_states.pt")
        saved |= {"module": {"language_model": model}, "dp_world_size": 1}
        saved["param_shapes"] = [{k: v.shape for k, v in flat.items()}]
        torch.save(saved, tag / f"mp_rank_{rank:02d}_model_states.pt")
        master = torch.cat([v.float().reshape(-1) for v in flat.values()])
        optimizer = {"zero_stage": 1, "single_partition_of_fp32_groups": [master]}
        name = f"bf16_zero_pp_rank_0_mp_rank_{rank:02d}_optim_states.pt"
        torch.save({"optimizer_state_dict": optimizer}, tag / name)
    found = convert("run", tmp_path / "ds", tmp_path / "hf", "--to", "hf", "--weights", kind)
    assert "without pipeline" in found.stderr
    expected = weights(src)
    if kind == "master":
        expected = {n: t.float() for n, t in expected.items()}
    same(weights(tmp_path / "hf"), expected)


@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("family", list(SPECS))
def test_torch_dist_with_experts(
    tmp_path: Path, convert: Convert, family: str, local: bool
) -> None:
    """megatron-core's names and stacking, as 0.16.1 writes them: experts ``[L, E, rows, columns]``;
    the norm before them is called as one of a dense layer where layers are ``local``. Layers that
    are not alike (a dense one first) are not stacked."""
    spec = SPECS[family]
    src = source(tmp_path, spec)
    convert("run", src, tmp_path / "mg", "--to", "megatron", "--megatron-layout", "core-te")
    model = state(next((tmp_path / "mg").glob("iter_*/*/*.pt")))["model"]
    tensors = {n: t for n, t in model.items() if isinstance(t, torch.Tensor)}
    assert spec.moe is not None
    layers: list[dict[str, torch.Tensor]] = []
    for layer in range(spec.layers):
        prefix = f"decoder.layers.{layer}."
        one = {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if prefix in n}
        for fc in ("linear_fc1", "linear_fc2"):
            names = [f"mlp.experts.{fc}.weight{e}" for e in range(spec.moe.experts)]
            if names[0] in one:
                one[f"mlp.experts.experts.{fc}.weight"] = torch.stack([one.pop(n) for n in names])
        if local and "pre_mlp_layernorm.weight" in one:
            one["mlp.linear_fc1.layer_norm_weight"] = one.pop("pre_mlp_layernorm.weight")
        layers.append(one)
    if spec.moe.first_dense_layers:
        for layer, one in enumerate(layers):
            tensors |= {f"decoder.layers.{layer}.{n}": t for n, t in one.items()}
    else:
        stacked = {n: torch.stack([one[n] for one in layers]) for n in layers[0]}
        tensors |= {f"decoder.layers.{n}": t for n, t in stacked.items()}
    folder = tmp_path / "dist"
    save = importlib.import_module("torch.distributed.checkpoint").save
    with warnings.catch_warnings():  # one process, which is what no_dist asks for
        warnings.simplefilter("ignore", UserWarning)
        save(tensors, checkpoint_id=folder, no_dist=True)
    (folder / "config.json").write_text((src / "config.json").read_text())
    convert("run", folder, tmp_path / "hf", "--to", "hf")
    same(weights(tmp_path / "hf"), weights(src))


def test_every_linear_layer_has_its_extra_state(tmp_path: Path, convert: Convert) -> None:
    """Megatron's strict loading wants ``_extra_state`` for experts too."""
    src = source(tmp_path, MIXTRAL)
    convert("run", src, tmp_path / "mg", "--to", "megatron")
    model = state(next((tmp_path / "mg").glob("iter_*/*/*.pt")))["model"]
    for expert in range(4):
        for fc in ("linear_fc1", "linear_fc2"):
            prefix = f"decoder.layers.3.mlp.experts.local_experts.{expert}.{fc}."
            assert f"{prefix}weight" in model
            assert model[f"{prefix}_extra_state"] is None
    assert "decoder.layers.3.mlp.router._extra_state" not in model
