"""The file that a launch script names by ``--deepspeed_config`` → what our config says of it.

DeepSpeed reads it, not Megatron: where both say something, the file's counts there, and here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastllm_train.errors import UserError
from fastllm_train.migrate.megatron_config import Migration, migrate, read_options
from fastllm_train.migrate.shell_script import Command

LARGEST = 1 << 20  # bytes; such files have some hundred
# Neither carried over nor missed: how DeepSpeed runs, not what it computes.
WITHOUT_EFFECT = {
    "steps_per_print", "wall_clock_breakdown", "dump_state", "memory_breakdown", "comms_logger",
    "flops_profiler", "tensorboard", "csv_monitor", "wandb", "aio", "prescale_gradients",
    "gradient_predivide_factor", "communication_data_type", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
}  # fmt: skip
HANDLED = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
    "gradient_clipping", "zero_optimization", "bf16", "bfloat16", "fp16", "data_types", "optimizer",
    "scheduler", "activation_checkpointing",
}  # fmt: skip
FP16 = {
    "loss_scale_window": "loss_scale_window",
    "hysteresis": "loss_scale_hysteresis",
    "min_loss_scale": "min_loss_scale",
}


def migrate_whole(command: Command, folder: Path, *, vocab: int | None = None) -> Migration:
    """``migrate``, with what the DeepSpeed configuration says that ``command`` names; ``folder``:
    the script's."""
    found = migrate(command, vocab=vocab)
    content = read_deepspeed_config(command, folder)
    if isinstance(content, str):
        found.notes.append(content)
    elif content is not None:
        apply_deepspeed_config(found, content)
    return found


def named_file(command: Command) -> str | None:
    """What the command gives to ``--deepspeed_config``."""
    options = read_options(command.arguments)
    given = options.get("deepspeed_config") or options.get("deepspeed-config") or [None]
    return given[0]


def read_deepspeed_config(command: Command, folder: Path) -> dict[str, Any] | str | None:
    """The file's content: as the script writes it, or from the disk, relative to the script's
    ``folder`` or to the current one. A line that says why it cannot be had; None where the command
    names none. ``UserError`` when a file is there and is no JSON object."""
    name = named_file(command)
    if name is None:
        return None
    text = command.documents.get(name)
    if text is None:
        path = next((p for p in (folder / name, Path(name)) if p.is_file()), None)
        if path is None:
            return f"--deepspeed_config {name}: no such file here, what it says is left out"
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than {LARGEST} bytes: no DeepSpeed configuration")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path}: {error}") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"--deepspeed_config {name} is not JSON: {error}",
            hint="correct it, or leave the option out of a copy of the script",
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"--deepspeed_config {name} holds no JSON object")
    return content


def apply_deepspeed_config(found: Migration, content: dict[str, Any]) -> None:
    """Carry ``content`` over into ``found``; a note for each setting that differs from the script's
    options or has no counterpart. ``UserError`` for a value of another type."""
    _batch(found, content)
    _zero(found, _section(content, "zero_optimization"))
    _precision(found, content)
    clip = _number(content, "gradient_clipping")
    if clip is not None:
        _settle(found, "optim.clip", clip, "gradient_clipping")
    for section in ("optimizer", "scheduler"):
        if section in content:
            kind = _section(content, section).get("type", "?")
            found.notes.append(f"deepspeed_config: {section} {kind}: the script's options are used")
    if _section(content, "activation_checkpointing").get("cpu_checkpointing"):
        found.notes.append("deepspeed_config: cpu_checkpointing: has no counterpart")
    for key in sorted(content.keys() - WITHOUT_EFFECT - HANDLED):
        found.notes.append(f"deepspeed_config: {key}: has no counterpart")


def _batch(found: Migration, content: dict[str, Any]) -> None:
    micro, whole = found.get("batch.micro", 1), found.get("batch.global")
    dp = found.get("parallel.dp")
    steps = None if dp is None else whole // (micro * dp)
    for key, here in (
        ("train_micro_batch_size_per_gpu", micro),
        ("train_batch_size", whole),
        ("gradient_accumulation_steps", steps),
    ):
        there = _number(content, key)
        if there is not None and here is not None and there != here:
            found.notes.append(
                f"deepspeed_config: {key} {there:g} is not the script's {here}, which is used"
            )


def _zero(found: Migration, zero: dict[str, Any]) -> None:
    stage = _number(zero, "stage")
    if stage is not None:
        _settle(found, "parallel.zero_stage", int(stage), "zero_optimization.stage")
    optimizer, params = (_device(zero, f"offload_{what}") for what in ("optimizer", "param"))
    if zero.get("cpu_offload") is True:  # its older name
        optimizer = ("cpu", "")
    if params[0] != "none" and optimizer[0] == "none":
        found.notes.append("deepspeed_config: offload_param without offload_optimizer: both here")
    if params[0] != "none":
        found.set("parallel.offload", "optimizer+params")
    elif optimizer[0] != "none":
        found.set("parallel.offload", "optimizer")
    path = next((p for device, p in (params, optimizer) if device == "nvme"), None)
    if path is not None:
        found.set("parallel.nvme_path", path)


def _device(zero: dict[str, Any], key: str) -> tuple[str, str]:
    """Device and folder of an offload section."""
    section = _section(zero, key)
    return str(section.get("device", "none") or "none"), str(
        section.get("nvme_path") or "/local_nvme"
    )


def _precision(found: Migration, content: dict[str, Any]) -> None:
    fp16 = _section(content, "fp16")
    bf16 = _section(content, "bf16") or _section(content, "bfloat16")
    for name, section in (("bf16", bf16), ("fp16", fp16)):
        if section.get("enabled") is True:
            _settle(found, "precision.dtype", name, f"{name}.enabled")
    dtype = found.get("precision.dtype")
    if dtype == "fp16" and fp16.get("enabled") is True:
        power = _number(fp16, "initial_scale_power")
        if power is not None:
            _settle(found, "precision.loss_scale", 2 ** int(power), "fp16.initial_scale_power")
        for key, ours in FP16.items():
            value = _number(fp16, key)
            if value is not None:
                _settle(found, f"precision.{ours}", max(1, int(value)), f"fp16.{key}")
        if _number(fp16, "loss_scale"):
            found.notes.append("deepspeed_config: fp16.loss_scale: the scale is dynamic here")
    if _section(content, "data_types").get("grad_accum_dtype") == "fp32" and dtype == "bf16":
        found.set("precision.accumulate", "fp32")


def _settle(found: Migration, name: str, value: Any, key: str) -> None:
    """Set ``name``; say so where an option of the script said something else."""
    before = found.get(name)
    if before is not None and before != value:
        found.notes.append(f"deepspeed_config: {key} {value} instead of the script's {before}")
    found.set(name, value)


def _section(table: dict[str, Any], key: str) -> dict[str, Any]:
    value = table.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"deepspeed_config: {key} is {json.dumps(value)}, not an object")
    return value


def _number(table: dict[str, Any], key: str) -> float | None:
    """None where it is missing or left to be filled in ("auto")."""
    value = table.get(key)
    if value is None or value == "auto":
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"deepspeed_config: {key} is {json.dumps(value)}, not a number")
    return value
