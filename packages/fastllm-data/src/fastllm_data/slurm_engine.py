"""Shards as a Slurm job array: scripts to look at, then to submit."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from fastllm_data.inputs import find_sources
from fastllm_data.options import TokenizeOptions
from fastllm_data.shards import plan_shards, prepare, shards_folder
from fastllm_data.tokenizer import load_tokenizer


def write_scripts(options: TokenizeOptions, shards: int) -> Path:
    """Write array.sh, join.sh and submit.sh into ``OUT.slurm``; returns the last one's path.

    Raises UserError for what the jobs would refuse: output that exists, inputs that are not there.
    """
    options.check()
    plan_shards(find_sources(options.inputs, options.form), shards)
    load_tokenizer(options.tokenizer, merges=options.merges, parse_special=options.parse_special)
    prepare(options)
    shards_folder(options.out).mkdir(parents=True, exist_ok=True)
    folder = options.out.with_name(options.out.name + ".slurm").absolute()
    folder.mkdir(exist_ok=True)
    command = shlex.join([sys.executable, "-m", "fastllm_data", "tokenize", *arguments(options)])
    command += f" --shards {shards} --resume"
    force = " --force" if options.force else ""
    name = options.out.name
    here = shlex.quote(str(Path.cwd()))
    head = f"""#!/bin/bash
#SBATCH --job-name={name}-tokenize
#SBATCH --output={folder}/%x-%A-%a.log
#SBATCH --cpus-per-task={options.workers}
"""
    array = f"""{head}#SBATCH --array=0-{shards - 1}
#SBATCH --requeue
# One shard; a requeued task goes on from its last checkpoint. Add your account, partition and time.
set -euo pipefail
cd {here}
exec {command} --shard "$SLURM_ARRAY_TASK_ID"
"""
    join = f"""{head}# Joins the shards; does here what is missing.
set -euo pipefail
cd {here}
exec {command}{force}
"""
    submit = f"""#!/bin/bash
# Submits the array, and the join for when all of it has succeeded. Arguments go to sbatch.
set -euo pipefail
job=$(sbatch --parsable "$@" {shlex.quote(str(folder / "array.sh"))})
sbatch --dependency="afterok:${{job%%;*}}" "$@" {shlex.quote(str(folder / "join.sh"))}
"""
    for file, content in (("array.sh", array), ("join.sh", join), ("submit.sh", submit)):
        path = folder / file
        path.write_text(content, encoding="utf-8")
        path.chmod(0o755)
    return folder / "submit.sh"


def arguments(options: TokenizeOptions) -> list[str]:
    """The options as ``tokenize`` takes them, without shards, resume and force."""
    said = [*options.inputs, "--tokenizer", str(options.tokenizer), "--out", str(options.out)]
    said += [word for key in options.keys for word in ("--key", key)]
    said += ["--format", options.form, "--empty-doc", options.empty_doc]
    said += ["--on-error", options.on_error, "--workers", str(options.workers)]
    said += ["--verify-sample", str(options.verify_sample)]
    said += ["--checkpoint-mb", repr(options.checkpoint_bytes / (1 << 20))]
    if options.merges is not None:
        said += ["--merges", str(options.merges)]
    if options.parse_special is not None:
        said += ["--parse-special" if options.parse_special else "--no-parse-special"]
    if options.split_sentences is not None:
        said += ["--split-sentences", options.split_sentences]
    switches = {
        "--append-eod": options.append_eod,
        "--add-bos": options.add_bos,
        "--hash-inputs": options.hash_inputs,
    }
    said += [name for name, on in switches.items() if on]
    return said + (["--encoder", "reference"] if options.reference_only else [])
