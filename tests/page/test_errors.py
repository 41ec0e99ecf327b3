"""What the page says when something is wrong, and the key that a server may want."""

from __future__ import annotations

import pytest
from playwright.sync_api import Page, expect

from tests.page.stub import Refusal, Stub, event


def start(page: Page, stub: Stub) -> None:
    page.goto(stub.url)
    page.get_by_label("Prompt").fill("Once")
    page.get_by_role("button", name="Generate").click()


@pytest.mark.parametrize(
    ("refusal", "words"),
    [
        (Refusal.of(400, "prompt of 9000 tokens"), "The server refuses: prompt of 9000 tokens"),
        (
            Refusal.of(503, "the queue is full", Retry_After="7"),
            "The server cannot answer now: the queue is full (try again in 7 s)",
        ),
        (Refusal.of(429, "too fast"), "The server cannot answer now: too fast"),
        (Refusal(502, b"<h1>Bad gateway</h1>"), "The server cannot answer now: 502 Bad Gateway"),
    ],
    ids=["400", "503", "429", "502"],
)
def test_a_refusal_is_told_in_words(page: Page, stub: Stub, refusal: Refusal, words: str) -> None:
    stub.refusal = refusal
    start(page, stub)
    expect(page.get_by_role("alert")).to_have_text(words)
    expect(page.locator("#measured")).to_have_text("Failed")

    stub.refusal = None
    page.get_by_role("button", name="Generate").click()
    stub.answer().say("There")
    expect(page.locator("#answer")).to_have_text("There")
    expect(page.get_by_role("alert")).to_be_hidden()


def test_an_error_amid_the_stream_keeps_the_text(page: Page, stub: Stub) -> None:
    start(page, stub)
    answer = stub.answer()
    answer.say(" upon")
    answer.send(event({"error": {"message": "out of memory"}}))
    expect(page.get_by_role("alert")).to_have_text("The server gave up: out of memory")
    expect(page.locator("#answer")).to_have_text(" upon")
    expect(page.get_by_role("button", name="Continue")).to_be_enabled()
    assert answer.abandoned()


@pytest.mark.parametrize("length", [None, 1_000_000], ids=["early end", "broken"])
def test_a_stream_that_breaks_off_is_no_answer(page: Page, stub: Stub, length: int | None) -> None:
    stub.length = length
    start(page, stub)
    answer = stub.answer()
    answer.say(" upon")
    expect(page.locator("#answer")).to_have_text(" upon")
    answer.hang_up()
    words = "The connection broke off. The answer is incomplete."
    expect(page.get_by_role("alert")).to_have_text(words)
    expect(page.locator("#answer")).to_have_text(" upon")


def test_a_server_that_is_gone(page: Page, stub: Stub) -> None:
    page.goto(stub.url)
    expect(page.get_by_label("Model")).to_have_value("tiny")
    stub.close()
    page.get_by_label("Prompt").fill("Once")
    page.get_by_role("button", name="Generate").click()
    words = "The server cannot be reached. Is it still running?"
    expect(page.get_by_role("alert")).to_have_text(words)


def test_a_key_is_asked_for_and_forgotten(page: Page, stub: Stub) -> None:
    stub.key = "sesame"
    page.goto(stub.url)
    key, alert = page.get_by_label("API key"), page.get_by_role("alert")
    expect(alert).to_have_text("The server wants an API key.")
    expect(key).to_be_focused()
    key.fill("wrong")
    key.press("Enter")
    expect(alert).to_have_text("The server does not accept this API key.")
    key.fill("sesame")
    page.get_by_role("button", name="Use this key").click()
    expect(page.get_by_label("Model")).to_have_value("tiny")
    expect(key).to_be_hidden()
    expect(alert).to_be_hidden()
    page.get_by_label("Prompt").fill("Once")
    page.keyboard.press("Control+Enter")
    stub.answer().say("Open")
    expect(page.locator("#answer")).to_have_text("Open")

    stored = "() => JSON.stringify([localStorage, sessionStorage, document.cookie])"
    assert "sesame" not in page.evaluate(stored)
    page.reload()
    expect(key).to_be_visible()
    expect(key).to_have_value("")


def test_without_a_key_nobody_is_asked_for_one(page: Page, stub: Stub) -> None:
    page.goto(stub.url)
    expect(page.get_by_label("Model")).to_have_value("tiny")
    expect(page.get_by_label("API key")).to_be_hidden()


def test_models_are_asked_for_again_when_the_server_was_not_ready(page: Page, stub: Stub) -> None:
    stub.key = "sesame"
    page.goto(stub.url)
    expect(page.get_by_role("alert")).to_be_visible()
    stub.key = None
    page.get_by_label("Prompt").fill("Once")
    page.get_by_role("button", name="Generate").click()
    assert stub.answer().body["model"] == "tiny"
