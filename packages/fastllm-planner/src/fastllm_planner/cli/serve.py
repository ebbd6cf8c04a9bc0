"""``serve``: the report's page, live on this machine."""

from __future__ import annotations

import click

from fastllm_planner.cli.options import verb

EXAMPLE = "fastllm-planner serve --port 8000"


@verb("serve", EXAMPLE)
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True)
def command(port: int) -> int:
    """The same page, live on 127.0.0.1."""
    from fastllm_planner.report.server import start

    server = start(port)
    click.echo(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C stops)", err=True)
    try:
        server.serve_forever()
    finally:
        server.server_close()
    return 0
