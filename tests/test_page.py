"""The page in a real browser: a search, a hit that plays from its moment, a file that is dropped in, a question."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import emcl
from conftest import short_run, write_clips
from emcl.search.index import VideoIndex
from emcl.search.windows import Windows
from test_serve import Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("serve")]
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, installed where it may be."""
    from playwright.sync_api import sync_playwright

    if shutil.which("chromium") is None and os.geteuid() == 0 and shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], capture_output=True)
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], capture_output=True)
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("no Chromium here, and it cannot be installed (root and apt-get are needed)")
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=program, args=QUIET)
        yield running
        running.close()


@pytest.fixture(scope="module")
def server(sample_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    run = short_run(sample_shards, folder)
    write_clips(sample_shards, folder / "videos")
    first = min((folder / "videos").glob("*.mp4"))
    first.rename(first.with_name("<img src=x onerror=alert(1)>.mp4"))  # a name is text, never markup
    index = VideoIndex(folder / "index", emcl.load(run, device="cpu"), windows=Windows(2.0, 0.0, "windows"))
    index.update(folder / "videos")
    with serving(folder / "index", run) as running:
        running.videos = folder / "videos"  # type: ignore[attr-defined]
        yield running


def opened(browser: Any, server: Server, wrong: list[str]) -> Any:
    """The server's page once its facts and buttons are there; what its console says against it is added to `wrong`."""
    page = browser.new_page(viewport={"width": 1200, "height": 900})
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(f"a dialog: {dialog.message}"))
    page.goto(f"http://127.0.0.1:{server.port}/")
    # the page asks for its facts when it has loaded, so that "loaded" is too early to look
    until(page, "document.querySelector('#facts').textContent")
    return page


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """On the server's page; whatever its console says against it fails the test."""
    wrong: list[str] = []
    page = opened(browser, server, wrong)
    yield page
    assert wrong == []
    page.close()


def until(page: Any, expression: str, seconds: float = 30) -> None:
    """Asked from outside: Playwright's own wait evaluates a string in the page, which its policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(50)


def search(page: Any, words: str) -> None:
    page.fill("#query", words)
    page.press("#query", "Enter")
    until(page, "document.querySelector('#status').textContent.includes('moments for')")


def playing(page: Any) -> Any:
    until(page, "document.querySelector('#video').readyState >= 2")
    return page.evaluate("({at: video.currentTime, long: video.duration, error: video.error})")


def test_a_search_and_a_click_play_the_moment(page: Any) -> None:
    assert page.inner_text("#facts").endswith("moments indexed")
    search(page, "a red circle moves left")
    hits = page.locator("#hits button")
    assert hits.count() == int(page.inner_text("#facts").split()[0]) > 12
    page.locator("#hits button", has_text="0:02.0").filter(has_not_text="0:00.0").first.click()
    player = playing(page)
    assert player["error"] is None and 1.9 <= player["at"] <= player["long"]
    page.wait_for_selector("#curve:not([hidden]) polyline")
    points = page.get_attribute("#plot polyline", "points").split()
    assert len(points) >= 4 and "a red circle moves left" in page.inner_text("#legend")
    until(page, "[...document.images].every((image) => image.complete && image.naturalWidth)")
    assert page.locator("#hits .path", has_text="<img src=x onerror=alert(1)>.mp4").count() > 0


def test_a_video_is_described_asked_about_and_dropped_in(page: Any, server: Server) -> None:
    search(page, "a circle")
    page.locator("#hits button").first.click()
    page.click("[data-task=captioning]")
    until(page, "document.querySelector('#said').textContent.startsWith('“')")
    page.fill("[data-task=msrvtt_qa] input", "what color is it?")
    page.press("[data-task=msrvtt_qa] input", "Enter")
    until(page, "document.querySelector('#said').textContent.includes('%')")
    page.click("#similar")
    until(page, "document.querySelector('#status').textContent.includes('look like')")
    file = sorted(server.videos.glob("*.mp4"))[-1]  # type: ignore[attr-defined]
    page.set_input_files("#file", str(file))
    until(page, f"document.querySelector('#status').textContent.endsWith('look like {file.name}')")
    assert file.name in page.locator("#hits .path").first.inner_text()
    assert playing(page)["error"] is None
    page.wait_for_selector("#curve:not([hidden]) polyline")
    page.click("[data-task=captioning]")
    until(page, "document.querySelector('#said').textContent.startsWith('“')")
    page.press("[data-task=msrvtt_qa] input", "Enter")
    until(page, "document.querySelector('#said').textContent.includes('%')")


def test_what_goes_wrong_is_said_on_the_page(browser: Any, server: Server, tmp_path: Path) -> None:
    page = opened(browser, server, [])
    (tmp_path / "no.mp4").write_bytes(b"no video")
    page.set_input_files("#file", str(tmp_path / "no.mp4"))
    page.wait_for_selector("#status.error")
    assert "does not decode" in page.inner_text("#status")
    page.close()


def test_the_keyboard_suffices(page: Any) -> None:
    search(page, "a circle")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "query"
    page.locator("#hits button").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert page.locator("#hits button").nth(1).get_attribute("aria-current") == "true"
    playing(page)
    page.wait_for_selector("#curve:not([hidden]) polyline")
    page.focus("#plot")
    page.evaluate("video.pause() ?? (video.currentTime = 0)")  # it may have played to its end by now
    page.keyboard.press("ArrowRight")
    until(page, "video.currentTime > 0")
    page.keyboard.press("Escape")
    assert page.locator("#player").is_hidden()
    assert page.locator("#hits button").nth(1).evaluate("(button) => button === document.activeElement")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_sticks_out_and_words_can_be_read(page: Any, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 740})
    search(page, "a circle")
    page.locator("#hits button").first.click()
    playing(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("body", "#facts", "#hits .path", "button[type=submit]", ".link"):
        assert page.evaluate(CONTRAST, selector) >= 4.5, selector


CONTRAST = """(place) => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const seen = (color) => { canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  let back = document.querySelector(place);
  const color = getComputedStyle(back).color;
  while (getComputedStyle(back).backgroundColor === "rgba(0, 0, 0, 0)") back = back.parentElement;
  const [a, b] = [light(seen(color)), light(seen(getComputedStyle(back).backgroundColor))];
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
