"""``fastllm-data split``."""

from __future__ import annotations

from pathlib import Path

import click

from fastllm_data.cli.app import ExampleCommand, print_json


@click.command(
    cls=ExampleCommand,
    example="fastllm-data split data/all_text_document --shares 949,50,1 --out data/all",
)
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option("--shares", help="Of the documents: train,valid,test, like 949,50,1.")
@click.option("--parts", type=click.IntRange(1), help="Parts of about equal numbers of tokens.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Output prefix.")
@click.option("--force", is_flag=True, help="Replace existing outputs.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def command(
    prefix: Path, shares: str | None, parts: int | None, out: Path, force: bool, as_json: bool
) -> None:
    """Cut a dataset into several, documents in order.

    Writes OUT_train, OUT_valid, OUT_test, or OUT_00000-of-0000N. `merge` of them is the whole.
    """
    from fastllm_data.errors import UserError
    from fastllm_data.indexed_dataset import IndexedDataset
    from fastllm_data.subset import split_by_parts, split_by_shares, write_subset

    if (shares is None) == (parts is None):
        raise UserError("give either --shares or --parts", "like --shares 949,50,1")
    dataset = IndexedDataset(prefix)
    if parts is not None:
        ranges = split_by_parts(dataset, parts)
    else:
        try:
            numbers = [float(part) for part in (shares or "").split(",")]
        except ValueError as error:
            raise UserError(f"--shares {shares!r}: not numbers", "like 949,50,1") from error
        ranges = split_by_shares(dataset, numbers)
    outs = {name: out.with_name(f"{out.name}_{name}") for name in ranges}
    for path in outs.values():
        if not force and path.with_name(path.name + ".idx").exists():
            raise UserError(f"{path} exists", "--force replaces it")
    made: list[dict[str, object]] = []
    for name, chosen in ranges.items():
        how = {"from": str(prefix), "documents": list(chosen)}
        part = write_subset(dataset, [chosen], outs[name], how=how, force=force)
        made.append(
            {
                "output": str(outs[name]),
                "first": chosen[0],
                "documents": part.documents,
                "tokens": len(part.tokens),
            }
        )
    if as_json:
        print_json({"outputs": made})
        return
    for row in made:
        click.echo(f"{row['output']}: {row['documents']:,} documents, {row['tokens']:,} tokens")
