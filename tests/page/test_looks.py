"""How the page lies and can be read: telephones, the keyboard, dark and light."""

from __future__ import annotations

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.page.stub import Stub

FORM = [
    "Prompt",
    "Generate",
    "Settings",
    "New tokens max",
    "Temperature",
    "Top p",
    "Top k 0 is off",
]
FORM += ["Seed", "Repetition penalty", "Stop at", "Defaults"]

FOCUSED = """() => {
  const element = document.activeElement;
  const label = element.labels?.[0] ?? element;
  const seen = getComputedStyle(element).outlineStyle !== "none";
  const text = label.querySelector("kbd") ? label.firstChild.textContent : label.textContent;
  return [text.trim().replace(/\\s+/g, " "), seen];
}"""


def test_everything_is_reached_by_tab_in_reading_order(page: Page, stub: Stub) -> None:
    page.goto(stub.url)
    expect(page.get_by_label("Model")).to_have_value("tiny")
    reached = []
    for _ in ["Model", *FORM]:
        page.keyboard.press("Tab")
        name, seen = page.evaluate(FOCUSED)
        assert seen, f"{name} does not show that it has the focus"
        reached.append(name)
    assert reached == ["Model", *FORM]


def test_what_an_answer_brings_is_reached_too(page: Page, stub: Stub) -> None:
    page.goto(stub.url)
    page.get_by_label("Prompt").fill("Once")
    page.keyboard.press("Control+Enter")
    answer = stub.answer()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Stop")).to_be_focused()
    answer.say("!")
    answer.end()
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.get_by_role("button", name="Defaults").focus()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Continue")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Copy")).to_be_focused()


WIDTH = "() => document.documentElement.scrollWidth"

# Under 44 px; a slider's thumb is moved from wherever its track is touched.
SMALL = """(controls) => controls.filter((control) => {
  const enough = control.type === "range" ? 32 : 44;
  return control.getBoundingClientRect().height < enough;
}).map((control) => control.outerHTML)"""

# Pairs that lie on each other.
OVERLAPPING = """(elements) => elements.flatMap((one, index) => elements.slice(index + 1)
  .filter((other) => {
    const [a, b] = [one.getBoundingClientRect(), other.getBoundingClientRect()];
    return a.left < b.right && b.left < a.right && a.top < b.bottom && b.top < a.bottom;
  })
  .map((other) => `${one.outerHTML} and ${other.outerHTML}`))"""


def test_a_telephone_has_one_column_and_room_for_fingers(page: Page, stub: Stub) -> None:
    long = "x" * 300
    stub.models = [long]
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(stub.url)
    prompt = page.get_by_label("Prompt")
    prompt.fill(long)
    page.keyboard.press("Control+Enter")
    answer = stub.answer()
    answer.say(long)
    expect(page.locator("#answer")).to_have_text(long)
    assert page.evaluate(WIDTH) == 360
    stub.key = "sesame"
    answer.end()
    page.evaluate("() => document.getElementById('model').replaceChildren()")
    expect(page.get_by_role("button", name="Generate")).to_be_enabled()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_role("alert")).to_be_visible()
    page.get_by_text("Settings").click()
    expect(page.get_by_label("Seed")).to_be_visible()

    assert page.evaluate(WIDTH) == 360
    controls = page.locator(":is(button, input, select, textarea, summary):visible")
    assert controls.count() > 15
    assert controls.evaluate_all(SMALL) == []
    assert (
        page.locator(":is(button, input, select, textarea, label):visible").evaluate_all(
            OVERLAPPING
        )
        == []
    )


# The contrast of an element's text with the first ground behind it, as WCAG 2 computes it.
CONTRAST = """(element) => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  let ground = element;
  while (channels(getComputedStyle(ground).backgroundColor)[3] === 0) ground = ground.parentElement;
  const luminance = (color) => channels(color).slice(0, 3).map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, index) => sum + value * [0.2126, 0.7152, 0.0722][index], 0);
  const text = luminance(getComputedStyle(element).color);
  const behind = luminance(getComputedStyle(ground).backgroundColor);
  return (Math.max(text, behind) + 0.05) / (Math.min(text, behind) + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_dark_and_light_can_be_read(browser: Browser, stub: Stub, scheme: str) -> None:
    stub.key = "sesame"
    page = browser.new_page(color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(stub.url)
    expect(page.get_by_role("alert")).to_be_visible()
    ground = page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(247, 247, 245)", "dark": "rgb(20, 21, 23)"}[scheme]
    texts = page.locator(":is(h1, h2, label, .note, button, input, textarea, .value, #answer, p)")
    contrasts = {
        str(element.get_attribute("id") or element.text_content()): element.evaluate(CONTRAST)
        for element in texts.all()
        if element.is_enabled()
    }
    assert len(contrasts) > 20
    assert {name: value for name, value in contrasts.items() if value < 4.5} == {}
    page.close()
