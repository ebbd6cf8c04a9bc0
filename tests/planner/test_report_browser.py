"""The page in a real browser: it draws, works by keyboard and when narrow, and stays local."""

from __future__ import annotations

import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastllm_planner.report.page import answer, render_page
from fastllm_planner.report.server import start

from .chromium import Browser, find
from .jobs import job

pytestmark = pytest.mark.skipif(find() is None, reason="needs Chromium (apt install chromium)")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find()
    assert program
    with Browser(program, tmp_path_factory.mktemp("profile")) as open_browser:
        yield open_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    question = job("llama-2-70b", "A100-80G", 64, "fastllm", global_batch=256, tokens=1e12)
    file = tmp_path_factory.mktemp("page") / "plan.html"
    file.write_text(render_page(answer(question, model="llama-2-70b")), encoding="utf-8")
    return file.as_uri()


def pixels(png: bytes) -> tuple[int, int, set[bytes]]:
    """Width, height and the distinct (filtered) rows of an 8-bit RGB(A) PNG: blank has few."""
    width, height = struct.unpack(">II", png[16:24])
    channels = {2: 3, 6: 4}[png[25]]
    data = b""
    at = 8
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        if kind == b"IDAT":
            data += png[at + 8 : at + 8 + size]
        at += 12 + size
    raw = zlib.decompress(data)
    stride = 1 + width * channels
    assert len(raw) == stride * height
    return width, height, {raw[i : i + stride] for i in range(0, len(raw), stride)}


def test_it_draws_and_asks_nobody(browser: Browser, page: str, tmp_path: Path) -> None:
    browser.resize(1000, 900)
    browser.requests.clear()
    browser.open(page)
    assert browser.run("document.documentElement.dataset.ready") == "yes"
    assert browser.requests == [page]
    drawn = browser.run(
        "[...document.querySelectorAll('section.plan:not([hidden]) svg')]"
        ".map(s => [s.getBoundingClientRect().width, s.getBoundingClientRect().height])"
    )
    assert len(drawn) >= 3
    assert all(width > 500 and height > 60 for width, height in drawn)
    width, height, rows = pixels(browser.screenshot(tmp_path / "page.png"))
    assert 960 <= width <= 1000  # a scroll bar may take its share
    assert height > 1200
    assert len(rows) > 300


def test_labels_stay_inside_their_picture(browser: Browser, page: str) -> None:
    browser.resize(1000, 900)
    browser.open(page)
    outside = browser.run(
        """[...document.querySelectorAll('section.plan:not([hidden]) svg, #map ~ figure svg')]
        .flatMap(svg => [...svg.querySelectorAll('text')].filter(t => {
            const a = t.getBoundingClientRect(), b = svg.getBoundingClientRect();
            return a.left < b.left - 1 || a.right > b.right + 1 || a.bottom > b.bottom + 1;
        }).map(t => t.textContent))"""
    )
    assert outside == []


def test_the_keyboard_chooses_a_strategy(browser: Browser, page: str) -> None:
    browser.open(page)
    shown = "[...document.querySelectorAll('section.plan')].filter(s => !s.hidden)[0].dataset.rank"
    assert browser.run(shown) == "1"
    label = "document.activeElement.getAttribute('aria-label') || ''"
    for _ in range(40):
        browser.press("Tab")
        if browser.run(label) == "Show strategy 2":
            break
    assert browser.run(label) == "Show strategy 2"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert browser.run(outline) == "solid"
    browser.press("Enter")
    assert browser.run(shown) == "2"
    pressed = "document.querySelector('tr[data-rank=\"2\"] button.show').ariaPressed"
    assert browser.run(pressed) == "true"
    assert browser.run("document.activeElement.id") == "pictures"


def test_copying_the_toml_says_so(browser: Browser, page: str) -> None:
    browser.open(page)
    # A file:// page has no clipboard: the fallback copies from a selected text area.
    browser.run(
        """Object.defineProperty(navigator, 'clipboard',
            {value: {writeText: () => Promise.reject(new Error('not here'))}});
        document.execCommand = () => {
            window.copied = document.activeElement.value;
            return true;
        };
        document.querySelector('button.copy').click()"""
    )
    assert browser.run("document.getElementById('status').textContent") == "Copied."
    assert 'preset = "llama-2-70b"' in browser.run("window.copied")


def test_a_narrow_screen_scrolls_pictures_not_the_page(browser: Browser, page: str) -> None:
    browser.resize(360, 740)
    browser.open(page)
    assert browser.run("document.documentElement.scrollWidth") <= 360
    assert browser.run("document.querySelector('.scroll').scrollWidth > 300")
    assert browser.run("parseFloat(getComputedStyle(document.body).fontSize)") >= 15
    browser.resize(1000, 900)


def test_the_live_page_answers_its_form(browser: Browser) -> None:
    server = start(0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        browser.open(f"http://127.0.0.1:{server.server_port}/")
        browser.run("document.querySelector('[name=gpus]').value = '32'")
        browser.run("document.querySelector('[name=gpus]').focus()")
        browser.press("Enter")
        browser.wait_for("Page.loadEventFired")
        heading = browser.run("document.querySelector('h1').textContent")
        assert heading.startswith("llama-3-8b on 32 × H100-SXM fits")
        assert browser.run("document.documentElement.dataset.ready") == "yes"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)
