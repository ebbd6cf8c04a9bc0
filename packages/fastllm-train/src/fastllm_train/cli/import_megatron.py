"""``fastllm-train import-megatron``: a Megatron launch script's arguments as a config."""

from __future__ import annotations

from pathlib import Path

import click

from fastllm_train.cli.app import verb


@verb(
    "import-megatron", "fastllm-train import-megatron pretrain_llama.sh --vocab 32000 --out a.toml"
)
@click.argument("script", type=click.Path(path_type=Path))
@click.option("--vocab", type=click.IntRange(min=1), help="Entries of the tokenizer.")
@click.option("--out", type=click.Path(path_type=Path), help="Write here, not to stdout.")
@click.option("--force", is_flag=True, help="Overwrite --out.")
def command(script: Path, vocab: int | None, out: Path | None, force: bool) -> None:
    """Turn the training command of SCRIPT (Megatron-LM, Megatron-DeepSpeed) into a config.

    The script is read, not run, and so is the file that it names by --deepspeed_config. What has no
    counterpart here is listed on stderr.
    """
    from fastllm_train.config import build_config
    from fastllm_train.errors import UserError
    from fastllm_train.migrate.deepspeed_json import migrate_whole
    from fastllm_train.migrate.shell_script import training_command
    from fastllm_train.refusals import refuse
    from fastllm_train.run_folder import write_atomically
    from fastllm_train.toml_text import to_toml

    if out is not None and out.exists() and not force:
        raise UserError(f"{out} exists", hint="choose another name, or add --force")
    try:
        text = script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {script}: {error}") from error
    found = migrate_whole(training_command(text), script.parent, vocab=vocab)
    config = build_config(found.table)
    refuse(config, config.model.resolve())
    result = to_toml(found.table)
    for note in found.notes:
        click.echo(f"note: {note}", err=True)
    if found.ignored:
        click.echo(f"without an effect here: {' '.join(found.ignored)}", err=True)
    if out is None:
        click.echo(result, nl=False)
        return
    write_atomically(out, result)
    click.echo(f"wrote {out}; next: fastllm-train check {out}", err=True)
