"""``fastllm-data merge``."""

from __future__ import annotations

from pathlib import Path

import click

from fastllm_data.cli.app import ExampleCommand, print_json


@click.command(cls=ExampleCommand, example="fastllm-data merge part0 part1 --out data/all")
@click.argument("prefixes", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output prefix.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(prefixes: tuple[Path, ...], out: Path, force: bool, as_json: bool) -> None:
    """Join datasets into one, in the order given.

    Documents keep their order; nothing is encoded again. Every part is checked before it is copied.
    """
    from fastllm_data.merge import merge

    made = merge(prefixes, out, force=force)
    result = {"output": str(out), "parts": len(prefixes), "documents": made.documents,
              "sequences": len(made), "tokens": len(made.tokens)}  # fmt: skip
    if as_json:
        print_json(result)
    else:
        click.echo(f"{out}: {made.documents:,} documents, {len(made.tokens):,} tokens")
