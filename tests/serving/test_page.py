"""The server's page: nothing a name or an answer says runs, and in a browser a chat works by keyboard alone, without a fault that axe-core finds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from iqlite.serving.page import headers, page
from tests.serving.conftest import Served
from tests.showing.test_page import NASTY, browser

__all__ = ["browser"]  # a fixture
AXE = Path(os.environ.get("IQLITE_AXE", ""))


def test_a_name_stays_text() -> None:
    text = page(NASTY)
    assert text.count("<script>") == 1 and text.count("<style>") == 1 and "\u202e" not in text and "\x1b" not in text and "<img" not in text
    policy = headers(text)["Content-Security-Policy"]
    assert "'unsafe-inline'" not in policy and policy.count("'sha256-") == 2 and "default-src 'none'" in policy


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_in_a_browser(browser: Any, served: Served, width: int, scheme: str) -> None:
    """A question that means harm, answered by two voices: every token's detail by keyboard, and a conversation exported."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=False)
    opened = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(served.url)
    opened.locator("#question:focus").wait_for()
    if width < 900:
        opened.locator("#panel summary").press("Enter")
    opened.locator("#tokens").fill("12")
    opened.locator("#system").fill(NASTY)
    if width < 900:
        opened.locator("#panel summary").press("Enter")
    opened.locator("#question").focus()
    opened.keyboard.insert_text(f"Hello {NASTY}")
    opened.keyboard.press("Enter")
    opened.locator("#status", has_text="Both voices have answered").wait_for(state="attached", timeout=60_000)
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert NASTY[:40] in opened.locator(".question").inner_text() and opened.evaluate("window.bad") is None
    for number in (0, 1):
        tokens = opened.locator(".answer").nth(number).locator(".token")
        assert tokens.count() > 1
        for _ in range(60):  # Shift+Tab alone leads from the question back into each answer
            opened.keyboard.press("Shift+Tab")
            if opened.evaluate("n => document.querySelectorAll('.answer')[n].contains(document.activeElement)", 1 - number):
                break
        seen = opened.locator(".answer").nth(1 - number).locator(".token")
        opened.keyboard.press("Home")
        for at in range(seen.count()):
            assert opened.evaluate(
                "([n, at]) => document.querySelectorAll('.answer')[n].children[at] === document.activeElement", [1 - number, at]
            )
            assert opened.locator("#detail").is_visible() and "description rewards it" in opened.locator("#detail").inner_text()
            opened.keyboard.press("ArrowRight")
    opened.keyboard.press("Escape")
    assert opened.locator("#detail").is_hidden()
    with opened.expect_download() as download:
        opened.locator("#export").press("Enter")
    kept = json.loads(Path(download.value.path()).read_text("utf-8"))
    assert kept["exchanges"][0]["question"] == f"Hello {NASTY}" and [one["model"] for one in kept["exchanges"][0]["answers"]] == [
        "base",
        "policy",
    ]
    assert said == [] and all(url.startswith((served.url, "blob:")) for url in asked)
    context.close()


@pytest.mark.skipif(not AXE.is_file(), reason="IQLITE_AXE names no axe.min.js: what it would find isn't looked for")
@pytest.mark.parametrize("width, scheme", [(1280, "dark"), (390, "light")])
def test_axe_finds_nothing(browser: Any, served: Served, width: int, scheme: str) -> None:
    """Before a question, and with an answer whose token is told of."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, bypass_csp=True)
    opened = context.new_page()
    opened.goto(served.url)
    opened.locator("#question:focus").wait_for()
    opened.add_script_tag(path=str(AXE))

    def violations() -> list[tuple[str, str]]:
        return [(one["id"], one["nodes"][0]["html"]) for one in opened.evaluate("axe.run()")["violations"]]

    opened.locator("#panel").evaluate("panel => panel.open = true")
    assert violations() == []
    opened.locator("#tokens").fill("8")
    opened.locator("#panel").evaluate("panel => panel.open = innerWidth > 900")
    opened.locator("#question").fill("Hello")
    opened.keyboard.press("Enter")
    opened.locator("#status", has_text="Both voices have answered").wait_for(state="attached", timeout=60_000)
    opened.locator(".token").first.click()
    assert opened.locator("#detail").is_visible() and violations() == []
    context.close()


def test_nothing_an_answer_says_runs(browser: Any, served: Served) -> None:
    """Text, tokens, alternatives, and the server's own complaint, all of them meaning harm."""
    token = {"token": NASTY, "logprob": -1.0, "top_logprobs": [{"token": NASTY, "logprob": -1.0}]}
    events: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"content": NASTY}, "logprobs": {"content": [token]}, "finish_reason": "stop"}]},
        {"choices": [], "rewards": {"index": 0, "tokens": [{"text": NASTY, "described": 1.0, "trained": -1.0, "reward": 2.0}]}},
        {"error": {"message": NASTY}},
    ]
    opened = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(message.text))
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
    opened.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    opened.goto(served.url)
    opened.locator("#question:focus").wait_for()
    opened.keyboard.insert_text("Hello")
    opened.keyboard.press("Enter")
    opened.locator("#status", has_text="Both voices have answered").wait_for(state="attached")
    assert "<script>" in opened.locator(".answer").first.inner_text() and "<script>" in opened.locator(".card .fault").first.inner_text()
    opened.locator(".token").first.click()
    assert "<script>" in opened.locator("#detail").inner_text() and "\u202e" not in opened.locator("body").inner_text()
    assert opened.locator("body img, body style").count() == 0 and opened.evaluate("window.bad") is None and said == []
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth")
    opened.context.close()
