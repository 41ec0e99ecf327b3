"""What happens between Generate and the answer's end."""

from __future__ import annotations

import re

from playwright.sync_api import Browser, Locator, Page, expect

from tests.page.stub import Answer, Stub, event, piece
from tests.page.tour import walk


def button(page: Page, name: str) -> Locator:
    return page.get_by_role("button", name=name)


def start(page: Page, stub: Stub, prompt: str = "Once") -> Answer:
    """Open the page, fill in the prompt, click; the answer is to be written."""
    page.goto(stub.url)
    page.get_by_label("Prompt").fill(prompt)
    button(page, "Generate").click()
    return stub.answer()


def test_text_appears_piece_by_piece(page: Page, stub: Stub) -> None:
    answer = start(page, stub)
    shown, measured = page.locator("#answer"), page.locator("#measured")
    expect(measured).to_have_text(re.compile(r"^Waiting, \d+\.\d\d s$"))
    expect(button(page, "Generate")).to_be_disabled()
    answer.say(" upon")
    expect(shown).to_have_text(" upon")
    expect(measured).to_have_text(re.compile(r"^first token \d+\.\d\d s · 1 token$"))
    answer.say(" a", " time")
    expect(shown).to_have_text(" upon a time")
    expect(measured).to_have_text(re.compile(r"· 3 tokens · [\d.]+ tokens/s$"))
    expect(page.get_by_role("status")).to_have_text("Generating")  # one word, not every piece

    answer.end("length", tokens=4)  # one token was half a character
    whole = re.compile(r"^Token limit reached · .* · 4 tokens · [\d.]+ tokens/s · seed \d+$")
    expect(measured).to_have_text(whole)
    expect(page.get_by_role("status")).to_have_text(whole)
    expect(button(page, "Generate")).to_be_enabled()
    expect(button(page, "Generate")).to_be_focused()
    expect(button(page, "Stop")).to_be_disabled()


def test_an_answer_that_ends_by_itself_says_so(page: Page, stub: Stub) -> None:
    answer = start(page, stub)
    answer.say("!")
    answer.end("stop")
    expect(page.locator("#measured")).to_contain_text("Ended · ")


def test_characters_survive_any_cut(page: Page, stub: Stub) -> None:
    answer = start(page, stub)
    first, second = piece("Grüße "), piece("漢字 🙂\n")
    cut = second.index("🙂".encode()) + 2
    answer.send(first + second[:cut])
    expect(page.locator("#answer")).to_have_text("Grüße ")
    answer.send(second[cut:])
    answer.end()
    expect(button(page, "Copy")).to_be_enabled()
    assert page.locator("#answer").text_content() == "Grüße 漢字 🙂\n"


def test_the_keyboard_starts_and_stops(page: Page, stub: Stub) -> None:
    page.goto(stub.url)
    page.get_by_label("Prompt").fill("Once")
    page.keyboard.press("Control+Enter")
    answer = stub.answer()
    answer.say(" upon")
    expect(page.locator("#answer")).to_have_text(" upon")
    page.keyboard.press("Control+Enter")  # an answer is being written: nothing happens
    page.keyboard.press("Escape")
    assert answer.abandoned()
    expect(page.locator("#measured")).to_contain_text("Stopped · ")
    expect(page.locator("#answer")).to_have_text(" upon")
    expect(page.get_by_label("Prompt")).to_be_focused()
    assert not stub.asked


def test_a_server_that_hangs_is_stopped_and_asked_again(page: Page, stub: Stub) -> None:
    answer = start(page, stub)
    expect(button(page, "Stop")).to_be_focused()  # so the same key stops it
    button(page, "Stop").click()
    assert answer.abandoned()
    expect(page.locator("#measured")).to_have_text("Stopped")
    expect(button(page, "Continue")).to_be_disabled()
    button(page, "Generate").click()
    stub.answer().say("There")
    expect(page.locator("#answer")).to_have_text("There")


def test_leaving_the_page_abandons_the_answer(page: Page, stub: Stub) -> None:
    answer = start(page, stub)
    page.reload()
    assert answer.abandoned()


def test_continue_goes_on_from_the_answer(page: Page, stub: Stub) -> None:
    answer = start(page, stub, "Once")
    answer.say(" upon a")
    answer.end("length")
    button(page, "Continue").click()
    answer = stub.answer()
    assert answer.body["prompt"] == "Once upon a"
    expect(page.get_by_label("Prompt")).to_have_value("Once upon a")
    expect(page.locator("#answer")).to_have_text("")
    answer.say(" time")
    answer.end()
    expect(page.locator("#answer")).to_have_text(" time")
    expect(button(page, "Continue")).to_be_focused()


def test_copy_puts_the_answer_on_the_clipboard(page: Page, stub: Stub) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = start(page, stub)
    answer.say(" upon\n", " a 🙂")
    answer.end()
    button(page, "Copy").click()
    expect(page.locator("#copy")).to_have_text("Copied")
    assert page.evaluate("() => navigator.clipboard.readText()") == " upon\n a 🙂"


def test_copy_selects_the_answer_where_there_is_no_clipboard(page: Page, stub: Stub) -> None:
    page.add_init_script("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    answer = start(page, stub)
    answer.say("upon a time")
    answer.end()
    button(page, "Copy").click()
    expect(page.get_by_role("status")).to_contain_text("Selected")
    assert page.evaluate("() => getSelection().toString()") == "upon a time"


HOSTILE = "<script>window.ran = 1</script><img src='/x' onerror='window.ran = 1'>&lt;b&gt;"


def test_markup_stays_text(page: Page, stub: Stub) -> None:
    stub.models = [HOSTILE]
    answer = start(page, stub, HOSTILE)
    assert answer.body["model"] == HOSTILE
    answer.say(HOSTILE)
    answer.send(event({"error": {"message": HOSTILE}}))
    expect(page.get_by_role("alert")).to_contain_text(HOSTILE)
    expect(page.locator("#answer")).to_have_text(HOSTILE)
    assert page.locator(":is(#answer, #error, #model option) *").count() == 0
    assert page.evaluate("() => window.ran") is None


def test_the_browser_refuses_to_make_markup_of_text(browser: Browser, stub: Stub) -> None:
    page = browser.new_page()
    page.goto(stub.url)
    mistake = """() => {
      try { document.body.innerHTML = "<b>x</b>"; } catch (error) { return error.name; }
    }"""
    assert page.evaluate(mistake) == "TypeError"
    page.close()


def test_long_answers_are_followed_unless_one_reads_above(page: Page, stub: Stub) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    answer = start(page, stub)
    at_end = """() => {
      const page = document.documentElement;
      return page.scrollTop > 0 && page.scrollTop + page.clientHeight >= page.scrollHeight - 32;
    }"""
    page.evaluate("() => scrollTo(0, document.documentElement.scrollHeight)")
    answer.say(*["line\n"] * 100)
    expect(page.locator("#answer")).to_contain_text("line\n" * 100, use_inner_text=True)
    page.wait_for_function(at_end)
    page.evaluate("() => scrollTo(0, 0)")
    answer.say("last")
    expect(page.locator("#answer")).to_contain_text("last")
    assert page.evaluate("() => scrollY") == 0


def test_the_tour(page: Page, stub: Stub) -> None:
    stub.automatic = True
    walk(page, stub.url, longest=5_000)
