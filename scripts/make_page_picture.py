"""Write docs/serving-page.png: the server's page after prompts of the demo have answered, in a real browser.

    make serve-demo                        # in another terminal
    python scripts/make_page_picture.py [--url http://127.0.0.1:8000] [--out docs/serving-page.png]

Needs a Chromium and Playwright for Python; reaches nothing but the server.
"""

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, expect, sync_playwright

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
NAMES = ("base", "describe", "title")
TEXT = "name: Ruby | kind: duck | age: two years | colour: white | likes: the garden =>"
MOST_BYTES = 200_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="a running demo of the server")
    parser.add_argument("--out", type=Path, default=Path("docs/serving-page.png"))
    options = parser.parse_args()
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not chromium:
        raise SystemExit("no chromium on the PATH")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        page = browser.new_page(viewport={"width": 1280, "height": 700})
        page.goto(options.url)
        fill(page)
        page.screenshot(path=options.out, full_page=True)
        browser.close()
    size = options.out.stat().st_size
    if size > MOST_BYTES:
        raise SystemExit(f"{options.out} has {size} bytes, more than {MOST_BYTES}")
    print(f"{options.out}: {size} bytes")


def fill(page: Page) -> None:
    """Ask twice, so that the times are those of prompts that are already loaded."""
    expect(page.locator("#prompts li")).not_to_have_count(0)
    for box in page.locator("#prompts input").all():
        box.set_checked(box.input_value() in NAMES)
    page.get_by_label("Max tokens").fill("32")
    page.get_by_label("Text", exact=True).fill(TEXT)
    for _ in range(2):
        page.keyboard.press("Control+Enter")
        expect(page.locator("#status")).to_have_text(f"{len(NAMES)} done", timeout=60_000)


if __name__ == "__main__":
    main()
