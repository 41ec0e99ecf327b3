"""The settings: what of them is asked of the server, and that they stay."""

from __future__ import annotations

from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.page.stub import Stub

PLAIN = {
    "model": "tiny",
    "prompt": "Once",
    "max_tokens": 128,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def asked(page: Page, stub: Stub, settings: dict[str, str]) -> dict[str, Any]:
    """The body that is sent with these settings, by their labels."""
    page.goto(stub.url)
    page.get_by_label("Prompt").fill("Once")
    for label, value in settings.items():
        page.get_by_label(label).fill(value)
    page.get_by_role("button", name="Generate").click()
    return stub.answer().body


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"Seed": "7"}, {"temperature": 0.8, "top_p": 0.95, "seed": 7}),
        ({"Temperature": "0"}, {"temperature": 0}),
        ({"Top k": "40", "Temperature": "0"}, {"temperature": 0}),
        (
            {"Top k": "40", "Top p": "1", "Seed": "0", "Repetition penalty": "1.2"},
            {"temperature": 0.8, "top_k": 40, "seed": 0, "repetition_penalty": 1.2},
        ),
        (
            {"Temperature": "0", "Stop at": "END\n\n\\n\\n\n\\\\n"},
            {"temperature": 0, "stop": ["END", "\n\n", "\\n"]},
        ),
    ],
    ids=["defaults", "greedy", "greedy with top k", "all", "stop strings"],
)
def test_what_is_asked(
    page: Page, stub: Stub, settings: dict[str, str], expected: dict[str, Any]
) -> None:
    assert asked(page, stub, settings) == PLAIN | expected


def test_a_seed_is_drawn_and_shown(page: Page, stub: Stub) -> None:
    page.goto(stub.url)
    page.get_by_label("Prompt").fill("Once")
    seeds = set()
    for _ in range(2):
        page.get_by_role("button", name="Generate").click()
        answer = stub.answer()
        answer.say("!")
        answer.end()
        expect(page.locator("#measured")).to_contain_text(f"seed {answer.body['seed']}")
        seeds.add(answer.body["seed"])
    assert len(seeds) == 2  # but for one time in 2 billion


def test_settings_that_do_nothing_are_off(page: Page, stub: Stub) -> None:
    page.goto(stub.url)
    page.get_by_label("Temperature").fill("0")
    expect(page.get_by_text("greedy")).to_be_visible()
    for label in ("Top p", "Top k", "Seed"):
        expect(page.get_by_label(label)).to_be_disabled()
    page.get_by_label("Temperature").fill("0.5")
    expect(page.get_by_label("Top k")).to_be_enabled()


def test_everything_is_kept_until_defaults_are_asked_for(page: Page, stub: Stub) -> None:
    stub.models = ["tiny", "poems"]
    page.goto(stub.url)
    expect(page.get_by_label("Model")).to_have_value("tiny")
    settings = {
        "Prompt": "Once\n upon",
        "New tokens": "9",
        "Temperature": "0.35",
        "Top p": "0.5",
        "Top k": "3",
        "Seed": "11",
        "Repetition penalty": "1.5",
        "Stop at": "END\n\\n",
    }
    standard = {label: page.get_by_label(label).input_value() for label in settings}
    for label, value in settings.items():
        page.get_by_label(label).fill(value)
    page.get_by_label("Model").select_option("poems")
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("poems")
    for label, value in settings.items():
        expect(page.get_by_label(label)).to_have_value(value)

    page.get_by_role("button", name="Defaults").click()
    for label, value in (standard | {"Prompt": "Once\n upon"}).items():
        expect(page.get_by_label(label)).to_have_value(value)


def test_a_model_that_is_gone_is_not_asked_for(page: Page, stub: Stub) -> None:
    stub.models = ["tiny", "poems"]
    page.goto(stub.url)
    page.get_by_label("Model").select_option("poems")
    stub.models = ["tiny"]
    page.reload()
    expect(page.get_by_label("Model")).to_have_value("tiny")


@pytest.mark.parametrize("stored", ["nonsense", "null", '{"temperature": 5, "prompt": null}'])
def test_what_others_stored_is_passed_over(page: Page, stub: Stub, stored: str) -> None:
    page.add_init_script(f"localStorage.setItem('controls', {stored!r})")
    page.goto(stub.url)
    expect(page.get_by_label("Model")).to_have_value("tiny")
    expect(page.get_by_label("Temperature")).to_have_value("0.8")


@pytest.mark.parametrize(
    ("label", "value"), [("New tokens", "0"), ("Top k", "1.5"), ("Seed", "-1")]
)
def test_a_wrong_setting_is_shown_instead_of_sent(
    page: Page, stub: Stub, label: str, value: str
) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(stub.url)
    page.get_by_label("Prompt").fill("Once")
    page.get_by_text("Settings").click()
    page.get_by_label(label).fill(value)
    page.get_by_text("Settings").click()
    expect(page.get_by_label(label)).to_be_hidden()
    page.get_by_role("button", name="Generate").click()
    expect(page.get_by_label(label)).to_be_focused()
    assert not stub.asked
