"""A walk through the page that any server must allow, whatever its model answers."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

# Presses Esc as soon as the answer has any text, in the same turn of the browser's event loop:
# however fast the model is, its answer is not over by then.
_STOP_AT_THE_FIRST_TEXT = """() => {
  const answer = document.getElementById("answer");
  new MutationObserver((_, observer) => {
    if (answer.textContent === "") return;
    observer.disconnect();
    document.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape" }));
  }).observe(answer, { characterData: true, subtree: true });
}"""


def walk(page: Page, url: str, longest: int) -> None:
    """Generate, continue, stop and load anew. longest: new tokens that surely take a while."""
    page.goto(url)
    answer, measured = page.locator("#answer"), page.locator("#measured")
    expect(page.get_by_label("Model")).not_to_have_value("")

    page.get_by_label("Prompt").fill("Once upon a time")
    page.get_by_label("New tokens").fill("8")
    page.get_by_label("Temperature").fill("0")
    page.get_by_role("button", name="Generate").click()
    expect(measured).to_contain_text(re.compile(r"(Ended|Token limit reached) · first token .* s"))
    expect(answer).not_to_have_text("")
    expect(page.get_by_role("alert")).to_be_hidden()

    first = answer.text_content()
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_label("Prompt")).to_have_value(f"Once upon a time{first}")
    expect(page.get_by_role("button", name="Continue")).to_be_enabled()

    page.get_by_label("New tokens").fill(str(longest))
    page.evaluate(_STOP_AT_THE_FIRST_TEXT)
    page.get_by_label("Prompt").press("Control+Enter")
    expect(measured).to_contain_text("Stopped")

    page.reload()
    expect(page.get_by_label("New tokens")).to_have_value(str(longest))
    expect(page.get_by_label("Model")).not_to_have_value("")
    expect(page.get_by_role("alert")).to_be_hidden()
