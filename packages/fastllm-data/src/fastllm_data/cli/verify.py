"""``fastllm-data verify``."""

from __future__ import annotations

from pathlib import Path

import click

from fastllm_data.cli.app import ExampleCommand, print_json


@click.command(cls=ExampleCommand, example="fastllm-data verify data/corpus_text_document")
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option("--vocab-size", type=click.IntRange(1), help="Default: from the sidecar.")
@click.option("--modes", is_flag=True, help="The index holds multimodal sequence modes.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(prefix: Path, vocab_size: int | None, modes: bool, as_json: bool) -> int:
    """Check every byte that can be checked.

    The index (header, lengths, offsets, boundaries, sizes), every token id, and the checksums in
    PREFIX.meta.json. Exit 0: nothing wrong; 1: something is, and where is printed.
    """
    from fastllm_data.verify import verify

    verdict = verify(prefix, vocab_size, modes=modes)
    if as_json:
        print_json(verdict.to_dict())
    else:
        for line in verdict.checked:
            click.echo(f"checked: {line}")
        for line in verdict.notes:
            click.echo(f"note: {line}")
        for line in verdict.problems:
            click.echo(f"wrong: {line}")
        click.echo("ok" if verdict.ok else f"{len(verdict.problems)} problems")
    return 0 if verdict.ok else 1
