"""The terminal mode without a terminal, and its commands."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
import torch

from neox.errors import ConfigError
from neox.inference import interactive
from neox.inference.commands import Session
from tests.inference.fakes import ByteTokenizer, FakeModel, config, mixed, script


def type_in(monkeypatch, lines: list[str | type[BaseException]]) -> None:
    """Answer `input()` with these lines; an exception class is raised; then the input ends."""
    answers: Iterator = iter(lines)

    def answer(prompt: str) -> str:
        print(prompt, end="")
        line = next(answers, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", answer)


def converse(monkeypatch, capsys, lines, logits=mixed, **values) -> str:
    type_in(monkeypatch, lines)
    settings = config(text_gen_type="interactive", **values)
    interactive.interactive(FakeModel(settings, logits), ByteTokenizer(), settings)
    return capsys.readouterr().out


def test_conversation(monkeypatch, capsys):
    said = converse(monkeypatch, capsys, ["ab", "cd"], script(2, [*"né 🎈".encode(), 256]))
    expected = "Context prompt >>> Generated Text: né 🎈\n"
    assert said == 2 * expected + "Context prompt >>> \n"


def test_text_is_shown_as_it_comes(monkeypatch):
    shown = []
    monkeypatch.setattr(interactive, "_say", lambda groups, text: shown.append(text))
    type_in(monkeypatch, ["ab"])
    settings = config(text_gen_type="interactive")
    interactive.interactive(
        FakeModel(settings, script(2, [*"hé!".encode(), 256])), ByteTokenizer(), settings
    )
    assert shown == ["Generated Text: ", "h", "", "é", "!", "\n", "\n"]


def test_prompts_of_several_lines_end_with_prompt_end(monkeypatch, capsys):
    seen = []

    def spy(history: list[int]) -> torch.Tensor:
        seen.append(bytes(token for token in history if token < 256).decode())
        return script(0, [256] * 99)(history)

    converse(monkeypatch, capsys, ["one", "two END ignored", "rest"], spy, prompt_end="END")
    assert sorted(seen, key=len)[-1] == "one\ntwo "
    assert "rest" in seen


def test_the_end_of_the_input_ends_it(monkeypatch, capsys):
    assert converse(monkeypatch, capsys, [EOFError]) == "Context prompt >>> \n"


def test_standard_input_may_hold_stray_bytes_or_be_closed(monkeypatch, capsys):
    model = FakeModel(config(text_gen_type="interactive", maximum_tokens=2), mixed)
    for stdin in (io.TextIOWrapper(io.BytesIO(b"na\xefve\n"), encoding="utf-8"), None):
        monkeypatch.setattr("sys.stdin", stdin)
        interactive.interactive(model, ByteTokenizer(), model.config)
    assert capsys.readouterr().out.count("Generated Text: ") == 1


def test_what_interrupts_a_pipe_ends_the_program(monkeypatch, capsys):
    def interrupted(history: list[int]) -> torch.Tensor:
        if len(history) > 3:
            raise KeyboardInterrupt
        return script(2, b"xy")(history)

    with pytest.raises(KeyboardInterrupt):
        converse(monkeypatch, capsys, ["ab", "never read"], interrupted)
    assert capsys.readouterr().out == "Context prompt >>> Generated Text: xy"


def test_what_comes_from_a_pipe_is_a_prompt_and_no_command(monkeypatch, capsys):
    seen = []

    def spy(history: list[int]) -> torch.Tensor:
        seen.append(bytes(history).decode())
        return script(0, [256] * 99)(history)

    prompts = [":quit", "\\:a", "b\\"]
    said = converse(monkeypatch, capsys, prompts, spy)
    assert [text for text in seen if text in prompts] == prompts
    assert said.count("Generated Text") == 3


def test_a_prompt_too_long_for_the_conversation_is_explained(monkeypatch, capsys):
    type_in(monkeypatch, [70 * "x", "ab"])
    settings = config(text_gen_type="interactive")
    interactive.interactive(
        FakeModel(settings, script(2, [*b"ok", 256])), ByteTokenizer(), settings
    )
    captured = capsys.readouterr()
    assert "the prompt has 70 tokens" in captured.err
    assert captured.out.count("Generated Text: ok\n") == 1


def test_settings_are_shown_and_changed():
    session = Session(config(temperature=0.5))
    session.index = 3
    assert session.command(":set").splitlines()[:2] == ["temperature 0.5", "top_k 0"]
    assert session.command(":set temperature 1") == "temperature 1.0"
    assert session.command(":set top_p=0.9") == "top_p 0.9"
    assert (session.config.temperature, session.config.top_p, session.index) == (1.0, 0.9, 3)
    assert session.command(" ".join([":set", "seed", "7"])) == "seed 7"
    assert (session.config.seed, session.index) == (7, 0)
    assert ":set NAME VALUE" in session.command(":help")


@pytest.mark.parametrize(
    "text, message",
    [
        (":set top_p 1.5", "top_p is 1.5, but it must be 1 or less."),
        (":set top_k many", 'top_k is "many", but it must be an integer.'),
        (":set maximum_tokens 0", "maximum_tokens is 0, but it must be 1 or more."),
        (":set temperature [", "--set temperature=[: "),
        (":set hidden_size 8", "write :set NAME VALUE, NAME one of temperature, "),
        (":set seed", "write :set NAME VALUE"),
        (":stop", ":stop is no command"),
        (":", ": is no command"),
    ],
)
def test_a_wrong_command_changes_nothing(text, message):
    session = Session(config())
    before = session.config
    with pytest.raises(ConfigError) as error:
        session.command(text)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert session.config is before
