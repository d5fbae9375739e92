"""The page at `/`, in a real browser before a real server: the embedded model and three prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("playwright")

from page_kit import (
    FAINT,
    KEY,
    NAMELESS,
    NARROW,
    Gate,
    Served,
    Visit,
    ask,
    browsing,
    card,
    check_layout,
    choose,
    chromium,
    colours,
    milliseconds,
    numbers,
    part,
    serving_page,
    visiting,
    wait_for,
)
from playwright.sync_api import Browser, Page, Route, expect

from softprompt.report import visible

BASE, WORDS, TALE, FREE = "base", "pets/words", "tale", "free"
TEXT = "Once upon a time there was a little dog named"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server that asks for a key."""
    chromium()
    with serving_page(tmp_path_factory.mktemp("page")) as found:
        yield found


@pytest.fixture(scope="module")
def server(served: Served) -> str:
    """The server's address."""
    return served.address


@pytest.fixture(scope="module")
def gate(served: Served) -> Gate:
    """What keeps answers under way."""
    return served.gate


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as found:
        yield found


@pytest.fixture
def visit(browser: Browser) -> Iterator[Visit]:
    with visiting(browser) as found:
        yield found


@pytest.fixture
def page(visit: Visit, server: str) -> Page:
    """The page with the key filled in."""
    page = visit.page
    page.goto(server)
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#prompts li")).to_have_count(4)
    return page


@pytest.mark.slow
def test_an_answer_that_comes_late_changes_nothing(visit: Visit, server: str) -> None:
    """What the server says to a page without a key arrives after its answer to the key."""
    page, held = visit.page, []

    def hold(route: Route) -> None:
        known = route.request.headers.get("authorization", "").endswith(KEY)
        route.continue_() if known else held.append(route)

    page.route("**/v1/*", hold)
    page.goto(server)
    page.get_by_label("API key").fill(KEY)
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#prompts li")).to_have_count(4)
    assert len(held) == 2
    for route in held:
        with page.expect_response(route.request.url) as late:
            route.continue_()
        assert late.value.status == 401
        late.value.finished()
    page.evaluate("() => new Promise((done) => setTimeout(done, 50))")  # the page has read it by then
    assert page.locator("#notice").is_hidden()
    expect(page.locator("#prompts li")).to_have_count(4)


def api(server: str, path: str, body: dict[str, Any] | None = None, key: str = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    if body is None:
        return httpx.get(f"{server}/{path}", headers=headers, timeout=60)
    return httpx.post(f"{server}/{path}", headers=headers, json=body, timeout=60)


def said(response: httpx.Response) -> str:
    """How the page shows a refusal: the status line and the server's own words."""
    assert response.is_error
    return f"{response.status_code} {response.reason_phrase}: {response.json()['error']['message']}"


@pytest.mark.slow
def test_answers_stream_side_by_side(page: Page, server: str, gate: Gate) -> None:
    names = [BASE, WORDS, TALE, FREE]
    choose(page, names)
    with gate.closed():
        ask(page, TEXT, max_tokens="40")
        for name in names:  # each shows the beginning of its answer while none has ended
            expect(part(page, name, "text")).not_to_be_empty()
        expect(page.get_by_role("status")).to_have_text("4 running")
        begun = {name: part(page, name, "text").text_content() or "" for name in names}
    wait_for(page, names, "done")
    for name in names:
        whole = part(page, name, "text").text_content() or ""
        assert whole.startswith(begun[name])
        assert len(whole) > len(begun[name])
    listing = {prompt["name"]: prompt for prompt in api(server, "v1/prompts").json()["data"]}
    answers = set()
    for name in names:
        asked = {"model": name, "prompt": TEXT, "max_tokens": 40, "temperature": 0}
        alone = api(server, "v1/completions", asked).json()
        answers.add(alone["choices"][0]["text"])
        expect(part(page, name, "text")).to_have_text(alone["choices"][0]["text"], use_inner_text=False)
        expect(part(page, name, "end")).to_have_text(alone["choices"][0]["finish_reason"])
        usage = alone["usage"]
        real = [usage["prompt_tokens"], usage["completion_tokens"]]
        assert numbers(part(page, name, "real").inner_text()) == real
        length = listing[name]["length"] if name in listing else 0
        assert numbers(part(page, name, "virtual").inner_text()) == [length]
        expect(part(page, name, "speed")).to_contain_text("tokens/s")
        first, everything = (milliseconds(part(page, name, which).inner_text()) for which in ("first", "all"))
        assert 0 < first < everything
    assert len(answers) == 4, "the prompts must differ for this test to mean something"
    expect(page.get_by_role("status")).to_have_text("4 done")


@pytest.mark.slow
def test_the_chat_api_where_it_is_chosen(page: Page, visit: Visit, server: str) -> None:
    choose(page, [TALE])
    page.get_by_label("chat").check()
    ask(page, TEXT, max_tokens="12", temperature="0.8", seed="3")
    wait_for(page, [TALE], "done")
    asked = {"model": TALE, "max_tokens": 12, "temperature": 0.8, "seed": 3}
    alone = api(server, "v1/chat/completions", {**asked, "messages": [{"role": "user", "content": TEXT}]}).json()
    expect(part(page, TALE, "text")).to_have_text(alone["choices"][0]["message"]["content"], use_inner_text=False)
    assert visit.requests[-1] == f"{server}/v1/chat/completions"


@pytest.mark.slow
def test_cancel(page: Page, gate: Gate) -> None:
    names = [BASE, WORDS, TALE]
    choose(page, names)
    with gate.closed():
        ask(page, TEXT, max_tokens="900")
        for name in names:
            expect(part(page, name, "first")).to_contain_text("ms")
            expect(part(page, name, "text")).not_to_be_empty()
        card(page, WORDS).get_by_role("button", name="Stop").click()
        wait_for(page, [WORDS], "cancelled")
        expect(page.get_by_role("status")).to_have_text("2 running, 1 cancelled")
        page.keyboard.press("Escape")
        wait_for(page, [BASE, TALE], "cancelled")
        expect(page.get_by_role("button", name="Cancel")).to_be_disabled()
        expect(part(page, BASE, "end")).to_have_text("cancelled")
    ask(page, TEXT, max_tokens="3")  # and it can be asked again
    wait_for(page, names, "done")
    for name in names:
        expect(part(page, name, "text")).not_to_be_empty()
    expect(part(page, BASE, "end")).to_have_text("length")


@pytest.mark.slow
def test_a_wrong_key_shows_what_the_server_says(page: Page, server: str, browser: Browser) -> None:
    page.get_by_label("API key").fill("wrong")
    page.get_by_label("API key").press("Tab")
    expect(page.get_by_role("alert").first).to_have_text(said(api(server, "v1/models", key="wrong")))
    choose(page, [TALE])
    ask(page, TEXT)
    wait_for(page, [TALE], "failed")
    asked = {"model": TALE, "prompt": TEXT}
    expect(part(page, TALE, "error")).to_have_text(said(api(server, "v1/completions", asked, key="wrong")))
    page.get_by_label("API key").fill(NARROW)
    page.get_by_label("API key").press("Tab")
    expect(page.locator("#prompts li")).to_have_count(len(api(server, "v1/models", key=NARROW).json()["data"]))
    page.reload()
    expect(page.get_by_label("API key")).to_have_value(NARROW)
    assert page.evaluate("[localStorage.length, document.cookie, sessionStorage.length]") == [0, "", 1]
    other = browser.new_context()
    tab = other.new_page()
    tab.goto(server)
    expect(tab.get_by_label("API key")).to_have_value("")
    other.close()


@pytest.mark.slow
def test_errors_of_the_server_are_shown_as_they_are(page: Page, server: str) -> None:
    choose(page, [BASE, TALE])
    for text, temperature in ((TEXT, -3), ("word " * 2000, 0)):
        ask(page, text, temperature=str(temperature))
        wait_for(page, [BASE, TALE], "failed")
        for name in (BASE, TALE):
            body = {"model": name, "prompt": text, "temperature": temperature, "max_tokens": 64}
            expect(part(page, name, "error")).to_have_text(said(api(server, "v1/completions", body)))
    ask(page, TEXT, max_tokens="2", temperature="0")
    wait_for(page, [BASE, TALE], "done")
    expect(part(page, BASE, "error")).to_be_hidden()


@pytest.mark.slow
def test_nearest_tokens(page: Page, server: str) -> None:
    page.get_by_role("button", name=f"Nearest tokens of {WORDS}").click()
    tokens = page.get_by_role("dialog", name=WORDS).get_by_role("listitem")
    expect(tokens).to_have_count(8)
    found = api(server, f"v1/prompts/{WORDS}/nearest").json()["tokens"]
    for place, (word, cosine) in enumerate(found[1]):
        line = tokens.nth(1).locator("div").nth(place)
        expect(line.locator("code")).to_have_text(visible(word))
        expect(line.locator("span")).to_have_text(f"{cosine:.2f}")
    assert found[1][0][1] == pytest.approx(1, abs=1e-3)  # it was made of words
    check_layout(page)
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(page.get_by_role("button", name=f"Nearest tokens of {WORDS}")).to_be_focused()
    page.get_by_role("button", name=f"Nearest tokens of {TALE}").click()  # keys and values are near no word
    refusal = said(api(server, f"v1/prompts/{TALE}/nearest"))
    expect(page.get_by_role("dialog").get_by_role("status")).to_have_text(refusal)
    page.get_by_role("button", name="Close").click()
    expect(page.get_by_role("dialog")).to_be_hidden()


@pytest.mark.slow
def test_nothing_comes_from_another_host(page: Page, visit: Visit, server: str) -> None:
    choose(page, [BASE])
    ask(page, TEXT, max_tokens="2")
    wait_for(page, [BASE], "done")
    requests, complaints = visit.requests, visit.complaints
    assert {request for request in requests if not request.startswith(f"{server}/")} == set()
    assert f"{server}/page/page.js" in requests
    allowed = [line for line in complaints if "401" not in line]  # the first look at the list, without a key
    assert allowed == []
    reached = "fetch('http://127.0.0.2:9/').then(() => 'reached', (error) => error.message)"
    assert page.evaluate(reached) != "reached"
    assert any("Content Security Policy" in line for line in complaints)
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {id: 'added'}))")
    for markup in ("document.body.innerHTML = '<b>bold</b>'", "document.getElementById('added').text = '1'"):
        assert "TypeError" in page.evaluate(
            f"(() => {{ try {{ {markup} }} catch (error) {{ return String(error) }} }})()"
        )


def test_the_files_of_the_page_and_no_others(server: str) -> None:
    for path, kind in (("", "text/html"), ("page/page.js", "text/javascript"), ("page/page.css", "text/css")):
        found = httpx.get(f"{server}/{path}")
        assert found.status_code == 200
        assert found.headers["content-type"] == f"{kind}; charset=utf-8"
        assert found.headers["x-content-type-options"] == "nosniff"
        policy = found.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert httpx.head(f"{server}/{path}").status_code == 200
    for path in ("page/", "page/index.html", "page/../page.py", "page/%2e%2e/page.py", "page/..%2fpage.py", "page/x"):
        assert httpx.get(f"{server}/{path}", headers={"Authorization": f"Bearer {KEY}"}).status_code == 404


@pytest.mark.slow
def test_layout_and_picture(page: Page, tmp_path: Path) -> None:
    names = [BASE, WORDS, TALE]
    choose(page, names)
    check_layout(page)
    ask(page, TEXT, max_tokens="40")
    wait_for(page, names, "done")
    assert page.evaluate(NAMELESS) == []
    for scheme, width in (("light", 390), ("light", 1280), ("dark", 1280)):
        page.emulate_media(color_scheme=scheme)
        page.set_viewport_size({"width": width, "height": 900})
        check_layout(page)
        assert page.evaluate(FAINT) == []
        page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
        assert colours(tmp_path / f"{scheme}-{width}.png") > 50
    tops = [card(page, name).bounding_box() for name in names]
    assert len({box["y"] for box in tops if box}) == 1, "three answers stand side by side on a wide page"
    page.goto("about:blank")
    page.screenshot(path=tmp_path / "blank.png")
    assert colours(tmp_path / "blank.png") == 1  # so that the check above can fail


@pytest.mark.slow
def test_by_keyboard_alone(visit: Visit, server: str) -> None:
    page = visit.page
    page.goto(server)
    page.keyboard.press("Tab")
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Tab")
    expect(page.locator("#prompts input:checked")).to_have_count(3)
    _tab_to(page, "#filter")
    page.keyboard.type("tal")
    expect(page.locator("#prompts li")).to_have_count(1)
    _tab_to(page, f"#prompts input[value={TALE}]")
    page.keyboard.press("Space")
    _tab_to(page, "#text")
    page.keyboard.type(TEXT)
    _tab_to(page, "#send")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_contain_text("done")


def _tab_to(page: Page, selector: str) -> None:
    for _ in range(25):
        page.keyboard.press("Tab")
        if page.locator(selector).evaluate("(node) => node === document.activeElement"):
            return
    raise AssertionError(f"Tab never reaches {selector}")
