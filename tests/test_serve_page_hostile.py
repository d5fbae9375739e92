"""The page before servers that ours is not: hostile ones, ones with ten thousand prompts, ones without a library."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")

from fastapi import FastAPI
from page_kit import Visit, ask, browsing, card, check_layout, choose, chromium, part, running, visiting, wait_for
from playwright.sync_api import Browser, Route, expect

from softprompt.serve.page import page_router

EVIL = "<img src=x onerror=\"document.title='owned'\"><b>bold</b>"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The page alone; what the API says is put in by each test."""
    chromium()
    app = FastAPI()
    app.include_router(page_router())
    with running(app) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    with visiting(browser) as found:
        yield found


def hostile(route: Route) -> None:
    """A server that says what ours cannot: markup in names, answers, words and reasons; ten thousand prompts."""
    path = route.request.url.split("/v1/")[1]
    if path == "models":
        prompts = [{"id": EVIL, "parent": "base"}, *({"id": f"p{n}", "parent": "base"} for n in range(10_000))]
        route.fulfill(json={"data": [{"id": "base", "parent": None}, *prompts]})
    elif path == "prompts":
        known = {"name": EVIL, "method": EVIL, "length": 3, "state": "served", "error": None}
        route.fulfill(json={"data": [known, {**known, "name": "bad", "state": "refused", "error": EVIL}]})
    elif path.endswith("nearest"):
        route.fulfill(json={"tokens": [[[EVIL, 0.5]]]})
    elif route.request.post_data_json["model"] == EVIL:
        answer = json.dumps({"choices": [{"text": EVIL}], "usage": None})
        route.fulfill(content_type="text/event-stream", body=f"data: {answer}\n\ndata: [DONE]\n\n")
    else:
        route.fulfill(status=429, headers={"Retry-After": "3"}, body=EVIL)


@pytest.mark.slow
def test_text_of_a_server_is_never_markup(visit: Visit, server: str) -> None:
    page = visit.page
    page.route("**/v1/**", hostile)
    page.goto(server)
    choose(page, ["base", EVIL])
    ask(page, "x")
    wait_for(page, [EVIL], "done")
    assert part(page, EVIL, "text").text_content() == EVIL
    expect(part(page, "base", "error")).to_have_text(f"429 Too Many Requests: {EVIL} (Retry-After: 3)")
    page.locator("#refused summary").click()
    expect(page.locator("#refused li")).to_have_text(f"bad {EVIL}")
    check_layout(page)
    page.get_by_role("button", name="Nearest tokens of").first.click()
    expect(page.get_by_role("dialog").locator("code")).to_have_text(EVIL)
    assert page.locator("img, article b").count() == 0
    assert page.title() == "softprompt"
    assert [line for line in visit.complaints if "429" not in line] == []


@pytest.mark.slow
def test_thousands_of_prompts(visit: Visit, server: str) -> None:
    page = visit.page
    page.route("**/v1/**", hostile)
    page.goto(server)
    expect(page.locator("#prompts li")).to_have_count(200)
    expect(page.locator("#count")).to_have_text("and 9,802 more: type a part of the name")
    page.get_by_label("Find a prompt by its name").fill("p999")
    expect(page.locator("#prompts li")).to_have_count(11)
    for number in range(3):
        page.locator("#prompts input").nth(number).check()
    expect(page.locator("#answers article")).to_have_count(6)
    assert page.locator("#prompts input:disabled").count() == 8, "a seventh answer would wait for a connection"
    page.get_by_label("Find a prompt by its name").fill("nobody")
    expect(page.locator("#count")).to_have_text("no such name")


@pytest.mark.slow
def test_a_server_without_a_library(visit: Visit, server: str) -> None:
    page = visit.page
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [{"id": "b"}, {"id": "lora", "parent": "b"}]}))
    page.route("**/v1/prompts", lambda route: route.fulfill(status=404, json={"detail": "Not Found"}))
    page.goto(server)
    expect(page.locator("#prompts li")).to_have_count(2)
    expect(page.locator("#notice")).to_be_hidden()
    expect(card(page, "lora").locator("[data-part=about]")).to_have_text("adapter")
    assert page.get_by_role("button", name="Nearest tokens of").count() == 0
