"""Draw the page for the documentation.

    .venv/bin/python -m tests.page.screenshot docs/images/page.png [--url http://127.0.0.1:8000/]

Of a server that runs at the URL; without one, of a scripted answer at 25 tokens a second.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

from playwright.sync_api import expect

from tests.page import chromium
from tests.page.stub import Stub

PROMPT = """\
The lighthouse had been dark for eleven years when the letter came. Marta read it twice, put on
her father's coat and walked down to the harbour to"""

ANSWER = """\
 see whether the boat was still there. It lay where he had left it, keel up under the tarpaulin,
 and the oars were dry. "You will want company," said the man from the fish market, who had
 followed her out of the rain. "It is four miles, and the lamp weighs more than you do.\""""


def speak(stub: Stub) -> None:
    answer = stub.answer()
    for word in re.findall(r"\s*[^\s]+", ANSWER.replace("\n", "")):
        answer.say(word)
        time.sleep(0.04)
    answer.end("stop")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--url")
    arguments = parser.parse_args()
    stub = Stub()
    stub.models = ["neox"]
    with chromium.launched() as browser:
        page = browser.new_page(viewport={"width": 1100, "height": 650})
        page.goto(arguments.url or stub.url)
        page.get_by_label("Prompt").fill(PROMPT.replace("\n", " "))
        page.keyboard.press("Control+Enter")
        if arguments.url is None:
            speak(stub)
        expect(page.get_by_role("button", name="Continue")).to_be_enabled(timeout=600_000)
        page.evaluate("() => document.activeElement.blur()")
        arguments.file.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=arguments.file)
    stub.close()


if __name__ == "__main__":
    main()
