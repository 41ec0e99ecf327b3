"""What the benchmarks of generation and of the server make of what they measure."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence

import pytest

from benchmarks.clients import Request, Turn, ask
from benchmarks.generate import BATCHED, agreement, ratios, shares
from benchmarks.generators import BATCH, NEW, PROMPT, Generation
from benchmarks.limits import Limits
from benchmarks.peer_models import SHAPE_410M


def generation(first: float, rest: float, tokens: Sequence[int] = range(NEW)) -> Generation:
    return Generation(first, rest, NEW - 1, [list(tokens)])


def test_speeds_and_their_ratios() -> None:
    """Prefill until the first token, decode behind it, total over both."""
    one = generation(0.5, 6.3)
    assert one.prefill == pytest.approx(PROMPT / 0.5)
    assert one.decode == pytest.approx(10.0)
    assert one.total == pytest.approx(NEW / 6.8)
    many = Generation(8.0, 12.6, BATCH * (NEW - 1), [list(range(NEW))] * BATCH)
    found = {
        "ours fp32": [one, one],
        "ours fp32" + BATCHED: [many, many],
        "transformers fp32": [generation(1.0, 12.6), generation(1.0, 25.2)],
    }
    compared = ratios(found)
    assert compared["fp32_decode_over_transformers"] == pytest.approx([2.0, 4.0])
    assert compared["batch16_over_single"] == pytest.approx([8.0, 8.0])
    assert compared["batch16_total_over_single"] == pytest.approx([BATCH * 6.8 / 20.6] * 2)
    assert set(compared) == {
        "fp32_decode_over_transformers",
        "batch16_over_single",
        "batch16_total_over_single",
    }


def test_shares_of_the_limits() -> None:
    """410M in 8 bits reads 353 MB for a token, and multiplies with 302 M weights for a prompt's."""
    limits = [Limits(read=20e9, fp32=200e9, int8=600e9)]
    prefill, decode = shares(SHAPE_410M, "int8", [generation(PROMPT / 500, 63 / 40)], limits)
    assert prefill == pytest.approx(500 * 2 * 301_989_888 / 600e9)
    assert decode == pytest.approx(40 * 353_501_184 / 20e9)


def test_a_program_that_computes_something_else_is_told() -> None:
    reference = generation(1.0, 1.0)
    late = [*range(20), *[0] * (NEW - 20)]
    early = [*range(5), *[0] * (NEW - 5)]
    found = {
        "transformers fp32": [reference, reference],
        "ours fp32": [reference, reference],
        "CTranslate2 fp32": [reference, generation(1.0, 1.0, late)],
        "llama.cpp fp32": [generation(1.0, 1.0, early), reference],
        "llama.cpp int4": [generation(1.0, 1.0, early), reference],
    }
    told = {name: agreement(name, found) for name in found}
    assert told["transformers fp32"] == ""
    assert told["ours fp32"] == "as transformers fp32: all"
    assert told["CTranslate2 fp32"] == "as transformers fp32: 20"
    assert told["llama.cpp fp32"] == "as transformers fp32: 5  IT COMPUTES SOMETHING ELSE"
    assert told["llama.cpp int4"] == "as transformers fp32: 5"


class Echo:
    """A server of /v1/completions that streams the prompt, a letter a token, when all have come."""

    def __init__(self, together: int) -> None:
        self._together = together
        self._here = 0
        self._all = asyncio.Event()
        self.most = 0

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        size = int(head.split("content-length:")[1].split()[0])
        body = json.loads(await reader.readexactly(size))
        self._here += 1
        self.most = max(self.most, self._here)
        if self._here == self._together:
            self._all.set()
        await self._all.wait()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        text = body["prompt"][: body["max_tokens"]]
        for letter in text:
            writer.write(event(choices=[{"text": letter}]))
        writer.write(event(choices=[], usage={"completion_tokens": len(text)}))
        writer.write(b"data: [DONE]\n\n")
        self._here -= 1
        writer.close()


def event(**values: object) -> bytes:
    return f"data: {json.dumps(values)}\n\n".encode()


def test_clients_ask_together_and_answers_keep_the_order_of_requests() -> None:
    requests = [Request(f"{i} and so on", 3 + i) for i in range(10)]

    async def run() -> tuple[Turn, int]:
        echo = Echo(together=4)
        async with (
            asyncio.timeout(30),
            await asyncio.start_server(echo.answer, "127.0.0.1", 0) as server,
        ):
            port = server.sockets[0].getsockname()[1]
            turn = await ask(f"http://127.0.0.1:{port}", None, requests, clients=4)
        return turn, echo.most

    turn, most = asyncio.run(run())
    assert most == 4
    assert [answer.text for answer in turn.answers] == [r.prompt[: r.tokens] for r in requests]
    assert [answer.tokens for answer in turn.answers] == [len(a.text) for a in turn.answers]
    assert turn.tokens_per_s == pytest.approx(sum(a.tokens for a in turn.answers) / turn.seconds)
    assert all(0 < answer.first <= answer.latency <= turn.seconds for answer in turn.answers)
    assert turn.latency(0.95) == max(answer.latency for answer in turn.answers)
