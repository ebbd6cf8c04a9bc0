"""The scripts people know, under their own options: each is ``run`` with its settings spelt out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastllm_convert.commands.options import json_option
from fastllm_convert.commands.run import convert
from fastllm_convert.errors import UserError

_FOLDER = click.Path(path_type=Path)

# What each script takes for granted about the rest.
_DEFAULTS: dict[str, Any] = {
    "source_format": None,
    "config": None,
    "weights": "model",
    "qkv_layout": "auto",
    "vocab_size": None,
    "max_seq_len": None,
    "rope_factor": None,
    "dtype": None,
    "tp": 1,
    "pp": 1,
    "vp": 1,
    "ep": 1,
    "shard_size": "5GB",
    "vocab_pad": 128,
    "megatron_layout": "legacy",
    "force": False,
    "no_crc": False,
    "fsync": False,
    "threads": None,
}


def _run(src: Path, dst: Path, *, as_json: bool, **settings: Any) -> None:
    convert(src, dst, as_json=as_json, **{**_DEFAULTS, **settings})


@click.command("meta-to-hf")
@click.option("--input-dir", type=_FOLDER, required=True, help="Meta's folder.")
@click.option("--output-dir", type=_FOLDER, required=True, help="New Hugging Face folder.")
@click.option("--model-size", help="Accepted and not needed: shards are counted.")
@click.option("--llama-version", help="Accepted and not needed: read from params.json.")
@json_option
def meta_to_hf(
    input_dir: Path,
    output_dir: Path,
    model_size: str | None,
    llama_version: str | None,
    as_json: bool,
) -> None:
    """As transformers' convert_llama_weights_to_hf.py. The stored type is kept.

    \b
    Example:
      fastllm-convert meta-to-hf --input-dir llama-2-7b --output-dir llama-2-7b-hf

    As there, INPUT may also be the folder above one named after the model size.
    """
    del llama_version
    if model_size and not (input_dir / "params.json").is_file():
        nested = input_dir / model_size
        if (nested / "params.json").is_file():
            input_dir = nested
    _run(input_dir, output_dir, as_json=as_json, source_format="meta", target="hf")


@click.command("hf-to-megatron")
@click.option("--load-dir", type=_FOLDER, required=True, help="Hugging Face folder.")
@click.option("--save-dir", type=_FOLDER, required=True, help="New Megatron folder.")
@click.option("--target-tensor-parallel-size", type=click.IntRange(1), default=1)
@click.option("--target-pipeline-parallel-size", type=click.IntRange(1), default=1)
@click.option("--tokenizer-model", type=_FOLDER, help="tokenizer.model to carry along.")
@json_option
def hf_to_megatron(
    load_dir: Path,
    save_dir: Path,
    target_tensor_parallel_size: int,
    target_pipeline_parallel_size: int,
    tokenizer_model: Path | None,
    as_json: bool,
) -> None:
    """As Megatron-LM's tools/checkpoint/util.py --loader llama2_hf --saver megatron.

    \b
    Example:
      fastllm-convert hf-to-megatron --load-dir llama-2-7b-hf --save-dir llama-2-7b-tp2 \\
          --target-tensor-parallel-size 2 --tokenizer-model llama-2-7b-hf/tokenizer.model

    Writes the legacy names of that script; `run --to megatron` writes megatron-core's.
    """
    if tokenizer_model is not None and not tokenizer_model.is_file():
        raise UserError(f"{tokenizer_model} does not exist")
    _run(
        load_dir,
        save_dir,
        as_json=as_json,
        source_format="hf",
        tokenizer_model=tokenizer_model,
        target="megatron",
        tp=target_tensor_parallel_size,
        pp=target_pipeline_parallel_size,
    )


@click.command("deepspeed-to-megatron")
@click.option("--input-folder", "--input_folder", type=_FOLDER, required=True)
@click.option("--output-folder", "--output_folder", type=_FOLDER, required=True)
@click.option("--target-tp", "--target_tp", type=click.IntRange(1), default=1)
@click.option("--target-pp", "--target_pp", type=click.IntRange(1), default=1)
@click.option("--config", type=_FOLDER, help="config.json, when the checkpoint has none.")
@json_option
def deepspeed_to_megatron(
    input_folder: Path,
    output_folder: Path,
    target_tp: int,
    target_pp: int,
    config: Path | None,
    as_json: bool,
) -> None:
    """As Megatron-DeepSpeed's tools/convert_checkpoint/deepspeed_to_megatron.py.

    \b
    Example:
      fastllm-convert deepspeed-to-megatron --input-folder ckpt --output-folder out --target-tp 2

    Any TP and PP, larger or smaller. That script corrupts SwiGLU models; this one does not.
    """
    _run(
        input_folder,
        output_folder,
        as_json=as_json,
        target="megatron",
        tp=target_tp,
        pp=target_pp,
        config=config,
    )


@click.command("deepspeed-to-hf")
@click.option("--input-folder", "--input_folder", type=_FOLDER, required=True)
@click.option("--output-folder", "--output_folder", type=_FOLDER, required=True)
@click.option("--config", type=_FOLDER, help="config.json, when the checkpoint has none.")
@json_option
def deepspeed_to_hf(
    input_folder: Path, output_folder: Path, config: Path | None, as_json: bool
) -> None:
    """As deepspeed_to_transformers.py, for any family.

    \b
    Example:
      fastllm-convert deepspeed-to-hf --input-folder ckpt --output-folder model-hf

    `run SRC DST --to hf --weights master` gives the fp32 masters instead.
    """
    _run(input_folder, output_folder, as_json=as_json, target="hf", config=config)
