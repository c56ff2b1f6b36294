"""Takes the screenshots in docs/search.md from a running server (`make demo`).

    python benchmarks/page_pictures.py http://127.0.0.1:8000 --out docs/images

Needs Playwright and Chromium (`apt-get install chromium`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    program = shutil.which("chromium")
    if program is None:
        sys.exit("no chromium here")
    with sync_playwright() as playwright:
        quiet = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=program, args=quiet)
        page = browser.new_page(viewport={"width": 1200, "height": 1020})
        look(page, options.url, "a red circle moves left")
        page.fill("[data-task=msrvtt_qa] input", "what color is it?")
        page.press("[data-task=msrvtt_qa] input", "Enter")
        shoot(page, "%", options.out / "search-page.png")
        page = browser.new_page(viewport={"width": 380, "height": 1000}, color_scheme="dark", device_scale_factor=1.5)
        look(page, options.url, "a green square moves up")
        page.click("[data-task=captioning]")
        shoot(page, "“", options.out / "search-phone.png")
        browser.close()


def look(page: Any, url: str, query: str) -> None:
    """Searches, opens the best moment and waits for its curve."""
    page.goto(url)
    page.fill("#query", query)
    page.press("#query", "Enter")
    page.locator("#hits button").first.click()
    page.wait_for_selector("#curve:not([hidden]) polyline")


def shoot(page: Any, said: str, file: Path) -> None:
    deadline = time.monotonic() + 30
    while said not in page.inner_text("#said") and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    page.evaluate("video.pause(), (video.currentTime = video.duration / 2), scrollTo(0, 0)")
    page.wait_for_timeout(1000)
    page.screenshot(path=file)


if __name__ == "__main__":
    main()
