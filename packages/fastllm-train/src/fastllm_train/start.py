"""How a run starts: its data, its folder, and the checkpoint it goes on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from fastllm_planner.arch import ArchSpec, to_hf_config
from fastllm_train import checkpoint, portable
from fastllm_train.config import Config, to_table
from fastllm_train.coordination import on_rank_0, say
from fastllm_train.data import SampleSource, open_training_data, open_validation_data
from fastllm_train.engine_choice import chosen_engine
from fastllm_train.errors import UserError
from fastllm_train.pretrained import PretrainedWeights
from fastllm_train.run_folder import RunFolder, write_atomically, write_config
from fastllm_train.saver import deepspeed_layout
from fastllm_train.schedule import planned_steps

STATE_SCHEMA = 1


def start_of(
    path: Path | None, config: Config, spec: ArchSpec
) -> portable.PortableCheckpoint | None:
    """The checkpoint an engine takes its weights from, if it is portable."""
    if path is None:
        return None
    if not portable.is_portable(path):
        on_rank_0(lambda: _refuse_other_layout(path, config))
        return None
    on_rank_0(lambda: portable.PortableCheckpoint(path, spec))  # says once what is wrong
    return portable.PortableCheckpoint(path, spec)


def pretrained(folder: Path, spec: ArchSpec) -> PretrainedWeights:
    """The weights to start from, of a Hugging Face folder."""
    on_rank_0(lambda: PretrainedWeights(folder, spec))  # says once what is wrong
    return PretrainedWeights(folder, spec)


def _refuse_other_layout(path: Path, config: Config) -> None:
    if chosen_engine(config) == "torch":
        raise UserError(
            f"{path} was written by DeepSpeed, which alone reads it",
            hint='go on with speed.engine="deepspeed" in the layout it was written in, with '
            'checkpoint.format="portable" to change engine or layout at the next one',
        )
    saved, wanted = checkpoint.layout_of(path), deepspeed_layout(config)
    if saved is not None and saved != wanted:
        changed = [f"{k} {saved.get(k)} → {v}" for k, v in wanted.items() if saved.get(k) != v]
        names = ", ".join(changed)
        raise UserError(
            f"{path} was written in another layout ({names}); DeepSpeed resumes only the same one",
            hint='write with checkpoint.format="portable" to change the layout, or use --fresh',
        )


class Data(NamedTuple):
    """``validation`` is None without evaluations."""

    training: SampleSource
    validation: SampleSource | None


def open_data_in_turn(config: Config, spec: ArchSpec) -> Data:
    """Rank 0 first: what is wrong with the files is then said once."""
    opened: list[Data] = []
    on_rank_0(lambda: opened.append(_open_data(config, spec)))
    return opened[0] if opened else _open_data(config, spec)


def _open_data(config: Config, spec: ArchSpec) -> Data:
    steps = planned_steps(config.schedule, config.batch)
    training = open_training_data(config.data, config.batch, steps=steps, vocab=spec.vocab)
    if not config.eval.every:
        return Data(training, None)
    samples = config.eval.samples
    return Data(
        training,
        open_validation_data(config.data, config.batch, samples=samples, vocab=spec.vocab),
    )


def start_again(folder: RunFolder) -> None:
    """Remove what an earlier run left (``--fresh``)."""
    checkpoint.clear(folder.checkpoints)
    folder.metrics.unlink(missing_ok=True)


def agree_on_checkpoint(folder: RunFolder) -> checkpoint.Found:
    """Rank 0 looks, all ranks use what it found."""
    answer: list[checkpoint.Found | None] = [None]
    if dist.get_rank() == 0:
        answer = [checkpoint.newest(folder.checkpoints)]
    dist.broadcast_object_list(answer, src=0)
    found = answer[0]
    assert found is not None
    for fault in found.rejected:
        say(f"warning: skipped a damaged checkpoint: {fault}")
    return found


def restore(state: dict[str, Any], config: Config) -> tuple[int, int]:
    """(step, consumed samples) of a checkpoint's state. ``UserError`` if the data's order would
    change."""
    if state.get("schema") != STATE_SCHEMA:
        raise UserError(f"the checkpoint's state has schema {state.get('schema')!r}")
    if state["data_seed"] != config.data.seed:
        raise UserError(
            f"the checkpoint was trained with data.seed={state['data_seed']}, the config says "
            f"{config.data.seed}: the data order would change",
            hint=f"set data.seed={state['data_seed']}, or start again with --fresh",
        )
    return int(state["step"]), int(state["consumed_samples"])


def prepare_folder(folder: RunFolder, config: Config, spec: ArchSpec) -> None:
    """The config, and what ``fastllm-convert`` needs beside the checkpoints."""
    write_config(folder, to_table(config))
    hf_config = to_hf_config(spec, dtype=config.precision.hf_name)
    text = json.dumps(hf_config, indent=2) + "\n"
    write_atomically(folder.checkpoints / "config.json", text)
    if config.data.tokenizer:
        tokenizer = Path(config.data.tokenizer)
        target = folder.checkpoints / f"tokenizer{tokenizer.suffix}"
        temporary = target.with_name(f".{target.name}.tmp")
        shutil.copyfile(tokenizer, temporary)
        temporary.replace(target)
