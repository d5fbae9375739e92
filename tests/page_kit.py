"""A real server of the embedded model, a real browser, and what it says of a page: how boxes lie, what can be read."""

from __future__ import annotations

import asyncio
import re
import shutil
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright
from transformers import AutoModelForCausalLM, AutoTokenizer

from softprompt import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model, initialize_from_text
from softprompt.embedded import PATH
from softprompt.serve import ServeOptions
from softprompt.serve.app import open_app
from softprompt.serve.engine import Ask, Piece

KEY, NARROW = "key-of-the-page", "key-of-a-guest"
KINDS = {"pets/words": PromptTuningConfig, "tale": PrefixTuningConfig, "free": PromptEncoderConfig}
STARTS = {
    "pets/words": "cat dog duck horse rabbit pony mouse bird",
    "tale": "The old man lived alone by the sea. Every night he went out in his boat and it rained and rained.",
}

FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

# Boxes are the lines of every text and every control, cut by what scrolls around them. Two of them must not meet, none
# may leave the page sideways, and no element's content may be wider than the element unless it scrolls.
LAYOUT = """() => {
  const root = document.querySelector("dialog[open]") ?? document.body, width = document.documentElement.clientWidth;
  const name = (node) => `${node.tagName} ${node.id || node.className} "${node.textContent.trim().slice(0, 30)}"`;
  const seen = (node) => node.checkVisibility() && !node.closest(".hidden");
  const cut = (box, node) => {
    let [left, top, right, bottom] = [box.left, box.top, box.right, box.bottom];
    for (let up = node; up; up = up.parentElement) {
      if (getComputedStyle(up).overflowY === "visible") continue;
      const edge = up.getBoundingClientRect();
      [left, top] = [Math.max(left, edge.left), Math.max(top, edge.top)];
      [right, bottom] = [Math.min(right, edge.right), Math.min(bottom, edge.bottom)];
    }
    return { left, top, right, bottom };
  };
  const problems = [], boxes = [];
  for (const node of root.querySelectorAll("*")) {
    if (!seen(node)) continue;
    const box = node.getBoundingClientRect(), style = getComputedStyle(node);
    if (box.left < -0.5 || box.right > width + 0.5) problems.push(`${name(node)} leaves the page`);
    const scrolls = style.overflowX !== "visible" || style.display === "inline";
    if (!scrolls && node.scrollWidth > node.clientWidth + 1) problems.push(`${name(node)} is too wide for its box`);
    if (node.matches("input, textarea, button")) boxes.push({ node, ...cut(box, node.parentElement) });
    for (const text of node.childNodes) {
      if (text.nodeType !== Node.TEXT_NODE || !text.data.trim()) continue;
      const range = document.createRange();
      range.selectNodeContents(text);
      for (const line of range.getClientRects()) boxes.push({ node, ...cut(line, node) });
    }
  }
  for (const [place, one] of boxes.entries()) for (const other of boxes.slice(place + 1)) {
    if (one.node === other.node || one.node.contains(other.node) && one.node.matches("button")) continue;
    const wide = Math.min(one.right, other.right) - Math.max(one.left, other.left);
    const high = Math.min(one.bottom, other.bottom) - Math.max(one.top, other.top);
    if (wide > 2 && high > 2) problems.push(`${name(one.node)} lies on ${name(other.node)}`);
  }
  return { problems, boxes: boxes.length, scrolls: document.documentElement.scrollWidth > width };
}"""

# Texts whose contrast with what is behind them is less than 4.5 (WCAG AA); what is switched off may be fainter.
FAINT = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (colour) => {
    const linear = (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = parts(colour).map((part) => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (node) => {
    for (let up = node; up; up = up.parentElement) {
      const colour = getComputedStyle(up).backgroundColor;
      if (parts(colour)[3] !== 0) return colour;
    }
    return "rgb(255, 255, 255)";
  };
  const faint = [];
  for (const node of document.body.querySelectorAll("*")) {
    const own = [...node.childNodes].some((child) => child.nodeType === Node.TEXT_NODE && child.data.trim());
    const off = node.closest(":disabled, [aria-disabled=true], label:has(:disabled), template");
    if (!own || off || !node.checkVisibility()) continue;
    const [one, other] = [light(getComputedStyle(node).color), light(behind(node))];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    if (contrast < 4.5) faint.push(`${node.textContent.trim().slice(0, 30)}: ${contrast.toFixed(2)}`);
  }
  return faint;
}"""

NAMELESS = """() => [...document.querySelectorAll("input, textarea, button")]
  .filter((node) => !(node.labels?.length || node.ariaLabel || node.textContent.trim()))
  .map((node) => node.outerHTML)"""


def write_prompts(folder: Path) -> None:
    """Three prompts of 8 virtual tokens: word vectors, keys and values of a text, and what an encoder starts with."""
    tokenizer = AutoTokenizer.from_pretrained(PATH)
    for name, kind in KINDS.items():
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(PATH), kind(task_type="CAUSAL_LM", num_virtual_tokens=8)
        )
        if name in STARTS:
            initialize_from_text(model, tokenizer, STARTS[name])
        model.save_pretrained(folder / name)


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """The address of `app` in a server of its own."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)


class Gate:
    """Answers that go on after their first pieces only while the gate is open.

    A test closes it, waits for what the page then shows, and opens it: so an answer is as long under way as the test
    needs it, however fast or busy the machine is.
    """

    FIRST = 6  # pieces, among them one with text

    def __init__(self, app: FastAPI) -> None:
        self._open = threading.Event()
        self._open.set()
        engine = app.state.service.engine
        self._generate, engine.generate = engine.generate, self._held

    async def _held(self, asked: Ask) -> AsyncIterator[Piece]:
        async with aclosing(self._generate(asked)) as pieces:
            sent = 0
            async for piece in pieces:
                yield piece
                sent += 1
                while sent >= self.FIRST and not self._open.is_set():
                    await asyncio.sleep(0.01)

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()


@dataclass(frozen=True)
class Served:
    """A running server: where it is, and the gate of its answers."""

    address: str
    gate: Gate


@contextmanager
def serving_page(folder: Path) -> Iterator[Served]:
    """A server with these prompts behind `KEY` (all of them) and `NARROW` (one)."""
    write_prompts(folder / "prompts")
    keys = folder / "keys.yaml"
    keys.write_text(f"{KEY}: ['*']\n{NARROW}: [tale]\n")
    options = ServeOptions(str(PATH), folder / "prompts", engine="transformers", name="base", keys=keys)
    with open_app(options) as app:
        gate = Gate(app)
        with running(app) as address:
            yield Served(address, gate)


def chromium() -> str:
    """The path of a Chromium of this machine; skips without one."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no chromium on this machine: the page is tested in a real browser only")
    return found


@contextmanager
def browsing() -> Iterator[Browser]:
    """A headless Chromium."""
    path = chromium()
    expect.set_options(timeout=60_000)  # a machine may be busy
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """A tab with nothing of others in it: all it asks for, and what the browser complains about."""

    def __init__(self, context: BrowserContext) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        context.on("request", lambda request: self.requests.append(request.url))
        context.on("weberror", lambda error: self.complaints.append(str(error.error)))
        context.on("console", lambda line: self.complaints.append(line.text) if line.type == "error" else None)
        self.page = context.new_page()


@contextmanager
def visiting(browser: Browser) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield Visit(context)
    context.close()


def card(page: Page, name: str) -> Locator:
    """The answer of the prompt `name`."""
    return page.locator("#answers").get_by_role("article", name=name, exact=True)


def part(page: Page, name: str, which: str) -> Locator:
    return card(page, name).locator(f"[data-part={which}]")


def choose(page: Page, names: list[str]) -> None:
    """Choose these prompts and no others."""
    boxes = page.locator("#prompts input")
    expect(boxes).not_to_have_count(0)
    wrong = "boxes.filter((box) => box.checked !== names.includes(box.value))"
    boxes.evaluate_all(f"(boxes, names) => {wrong}.forEach((box) => box.click())", names)
    expect(page.locator("#answers article")).to_have_count(len(names))


def ask(page: Page, text: str, **settings: str) -> None:
    """Fill the form in and send it by the keyboard."""
    for name, value in settings.items():
        page.locator(f"#{name}").fill(value)
    page.get_by_label("Text", exact=True).fill(text)
    page.keyboard.press("Control+Enter")


def wait_for(page: Page, names: list[str], state: str) -> None:
    for name in names:
        expect(card(page, name)).to_have_attribute("data-state", state)


def numbers(text: str) -> list[int]:
    return [int(found.replace(",", "")) for found in re.findall(r"[\d,]+", text)]


def milliseconds(text: str) -> float:
    """A time as the page shows it: `1,542 ms`, or from ten seconds on `16.2 s`."""
    number, unit = text.split()
    return float(number.replace(",", "")) * {"ms": 1, "s": 1000}[unit]


def check_layout(page: Page) -> None:
    """No box on another, none outside, at the width the page has."""
    found = page.evaluate(LAYOUT)
    assert found["problems"] == []
    assert not found["scrolls"], "the page scrolls sideways"
    assert found["boxes"] > 10


def colours(picture: Path) -> int:
    """How many colours a picture has; a blank page has one."""
    from PIL import Image

    with Image.open(picture) as image:
        return len(image.convert("RGB").getcolors(maxcolors=1 << 24) or ())
