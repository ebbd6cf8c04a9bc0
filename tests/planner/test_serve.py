"""``serve``: the page over HTTP, on 127.0.0.1, from presets only."""

from __future__ import annotations

import http.client
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from fastllm_planner.__main__ import main
from fastllm_planner.arch import preset_names
from fastllm_planner.report.server import HOST, start


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = start(0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


def get(port: int, path: str, host: str | None = None) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(HOST, port, timeout=20)
    try:
        connection.request("GET", path, headers={"Host": host or f"{HOST}:{port}"})
        answer = connection.getresponse()
        kind = answer.headers["Content-Type"]
        return answer.status, kind, answer.read().decode()
    finally:
        connection.close()


QUESTION = "model=llama-3-8b&gpu=H100-SXM&gpus=16&gpus-per-node=8&global-batch=64&tokens=1T"


def test_the_first_page_is_a_form_with_every_preset(port: int) -> None:
    status, kind, page = get(port, "/")
    assert status == 200
    assert kind.startswith("text/html")
    for name in preset_names():
        assert f">{name}</option>" in page


def test_an_answer_is_the_report_with_the_form_filled(port: int) -> None:
    status, _, page = get(port, f"/?{QUESTION}")
    assert status == 200
    assert "llama-3-8b on 16 × H100-SXM fits" in page
    assert 'name="gpus" value="16"' in page
    assert "<svg" in page


def test_json_is_what_plan_prints(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    status, kind, body = get(port, f"/plan.json?{QUESTION}")
    assert (status, kind) == (200, "application/json; charset=utf-8")
    args = [word for pair in QUESTION.split("&") for word in ("--" + pair).split("=")]
    assert main(["plan", *args, "--explain", "--json"]) == 0
    assert json.loads(body) == json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("model=llama-9&gpus=8", "unknown model"),
        ("gpu=H101&gpus=8", "unknown GPU"),
        ("gpus=0", "not a positive"),
        ("gpus=lots", "not a whole number"),
        ("gpus=100000000", "form plans up to"),
        ("tokens=%3Cscript%3E", "is not a number"),
        ("model=/etc/passwd&gpus=8", "unknown model"),
        ("model=../config.json&gpus=8", "unknown model"),
        ("backend=--help&gpus=8", "unknown backend"),
    ],
)
def test_refusals_are_400_with_the_form_kept(port: int, query: str, message: str) -> None:
    status, _, page = get(port, f"/?{query}")
    assert status == 400
    assert message in page
    assert "<form" in page
    assert "<script>alert" not in page
    status, _, body = get(port, f"/plan.json?{query}")
    assert status == 400
    assert message in json.loads(body)["error"]


def test_nothing_else_is_served(port: int) -> None:
    for path in ("/etc/passwd", "/../pyproject.toml", "/page.css", "/plan.json/x"):
        assert get(port, path)[0] == 404


def test_a_request_for_another_host_is_refused(port: int) -> None:
    assert get(port, "/", host="evil.example")[0] == 403
    assert get(port, "/", host=f"localhost:{port}")[0] == 200


def test_the_command_serves_until_interrupted() -> None:
    # A shell starts background jobs with SIGINT ignored, and a test run may be one.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from fastllm_planner.__main__ import main; sys.exit(main(['serve', '--port', '0']))"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        address = re.search(r"http://127\.0\.0\.1:(\d+)/", process.stderr.readline())
        assert address
        assert get(int(address[1]), "/")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 130


def test_a_taken_port_is_one_error(port: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--port", str(port)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: cannot listen on port {port}")
