"""``serve``: the page with a form, on 127.0.0.1 alone, with the standard library's HTTP server.

The query string is read by the ``plan`` command's own options, so both refuse the same things. A
model is a preset's name here, never a path: another page open in the browser must not be able to
make this one read files. For the same reason a request must name this host (DNS rebinding).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from html import escape
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

import click

from fastllm_planner.arch import ArchError, preset, preset_names
from fastllm_planner.backends import backend_names
from fastllm_planner.cli.job_options import build_job
from fastllm_planner.cli.plan import command as plan_command
from fastllm_planner.errors import UserError
from fastllm_planner.hardware import gpu_names
from fastllm_planner.report.page import answer, html_page, render_page

HOST = "127.0.0.1"
MAX_DEVICES = 65_536  # a form should answer in a blink


@dataclass(frozen=True)
class Field:
    """One input of the form; ``name`` is the option of ``plan`` without its dashes."""

    name: str
    label: str
    default: str = ""
    kind: str = "text"


FIELDS = (
    Field("model", "Model", "llama-3-8b", "models"),
    Field("gpu", "GPU", "H100-SXM", "gpus"),
    Field("gpus", "GPUs", "64", "number"),
    Field("gpus-per-node", "GPUs per node", "8", "number"),
    Field("global-batch", "Sequences a step", "", "number"),
    Field("seq-len", "Sequence length", "", "number"),
    Field("tokens", "Tokens to train on", "1T"),
    Field("backend", "Backend", "fastllm", "backends"),
    Field("price", "Price per GPU-hour"),
)


def start(port: int) -> ThreadingHTTPServer:
    """A server bound to 127.0.0.1; port 0 takes a free one. ``UserError`` if it is taken."""
    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UserError(f"cannot listen on port {port}: {error.strerror}", "use --port") from error


class Handler(BaseHTTPRequestHandler):
    """``/`` is the page, ``/plan.json`` the same answer as JSON."""

    server_version = "fastllm-planner"
    sys_version = ""
    pages: ClassVar[tuple[str, ...]] = ("/", "/plan.json")

    def do_GET(self) -> None:
        """Answer a question given in the query string."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        if host not in (HOST, "localhost"):
            self._send(HTTPStatus.FORBIDDEN, "text/plain", "this server answers to 127.0.0.1")
            return
        url = urlsplit(self.path)
        if url.path not in self.pages:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", "no such page")
            return
        values = {field.name: field.default for field in FIELDS}
        values |= {key: value for key, value in parse_qsl(url.query) if key in values}
        if not url.query and url.path == "/":
            self._send(HTTPStatus.OK, "text/html", _empty_page(values))
            return
        self._answer(values, as_json=url.path == "/plan.json")

    def _answer(self, values: dict[str, str], *, as_json: bool) -> None:
        try:
            found = answer(job_of(values), model=values["model"])
        except (UserError, ArchError) as error:
            self._refuse(values, str(error), error.hint, as_json=as_json)
        except click.ClickException as error:
            self._refuse(values, error.format_message(), "", as_json=as_json)
        else:
            if as_json:
                self._send(HTTPStatus.OK, "application/json", json.dumps(found.to_json()))
            else:
                self._send(HTTPStatus.OK, "text/html", render_page(found, form=form(values)))

    def _refuse(self, values: dict[str, str], message: str, hint: str, *, as_json: bool) -> None:
        status = HTTPStatus.BAD_REQUEST
        if as_json:
            body = json.dumps({"schema": 1, "error": message, "hint": hint})
            self._send(status, "application/json", body)
            return
        words = f'<h1 class="no">{escape(message)}</h1><p>{escape(hint)}</p>'
        page = html_page("fastllm-planner", f"{form(values)}{words}")
        self._send(status, "text/html", page)

    def _send(self, status: HTTPStatus, kind: str, body: str) -> None:
        raw = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header(
            "Content-Security-Policy",
            "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
            "form-action 'self'; frame-ancestors 'none'",
        )
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: the address was printed, and a page per second is no news."""


def job_of(values: dict[str, str]) -> Any:
    """The job that the form describes, parsed as ``plan`` parses its options."""
    preset(values["model"])
    args = [word for key, value in values.items() if value for word in (f"--{key}", value.strip())]
    context = plan_command.make_context("plan", args)
    if context.params["gpus"] > MAX_DEVICES:
        raise UserError(f"the form plans up to {MAX_DEVICES:,} devices", "use the command line")
    return build_job(context.params)


def form(values: dict[str, str]) -> str:
    """The form, filled with what was asked."""
    inputs = "".join(_input(field, values[field.name]) for field in FIELDS)
    return f'<form method="get" action="/" aria-label="Job">{inputs}<button>Plan</button></form>'


def _input(field: Field, value: str) -> str:
    choices = {"models": preset_names, "gpus": gpu_names, "backends": backend_names}
    safe = escape(value)
    if field.kind in choices:
        options = "".join(
            f"<option{' selected' if name == value else ''}>{escape(name)}</option>"
            for name in choices[field.kind]()
        )
        return f'<label>{field.label}<select name="{field.name}">{options}</select></label>'
    kind = "number" if field.kind == "number" else "text"
    least = ' min="1"' if kind == "number" else ""
    entry = f'<input type="{kind}" name="{field.name}" value="{safe}"{least}>'
    return f"<label>{field.label}{entry}</label>"


def _empty_page(values: dict[str, str]) -> str:
    words = "<h1>What fits, how fast, and with which strategy?</h1>"
    return html_page(
        "fastllm-planner", f'<p class="brand">fastllm-planner</p>{words}{form(values)}'
    )
