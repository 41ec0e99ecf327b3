"""Clients that leave, servers that stop, decoders that fail."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.serving.fakes import FakeDecoder, serving, wait_until
from tests.serving.test_limits import connect, post, request

KILLED = int(os.environ.get("NEOX_KILLED_CLIENTS", "150"))
LONG = {"prompt": "x", "max_tokens": 400, "min_tokens": 400, "seed": 0}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_frees_its_rows(stream: bool, n: int) -> None:
    with serving(serve_rows=2) as server:
        server.decoder.step_s = 0.01
        body = json.dumps({**LONG, "stream": stream, "n": n}).encode()
        with connect(server.url) as connection:
            connection.sendall(request(body))
            wait_until(lambda: len(server.decoder.submitted) == n)
            if stream:
                assert connection.recv(10)
        wait_until(lambda: server.decoder.idle)
        assert sorted(server.decoder.cancelled) == list(range(1, n + 1))
        assert f"neox_cancellations_total {n}.0" in httpx.get(f"{server.url}/metrics").text
        assert post(server.url).status_code == 200


def test_a_client_that_leaves_the_queue_is_never_decoded() -> None:
    with serving(serve_rows=1) as server, ThreadPoolExecutor(1) as pool:
        server.decoder.gate.clear()
        first = pool.submit(post, server.url)
        wait_until(lambda: server.decoder.running == 1)
        with connect(server.url) as connection:
            connection.sendall(request(json.dumps(LONG).encode()))
            wait_until(lambda: server.decoder.waiting == 1)
        wait_until(lambda: server.decoder.waiting == 0)
        server.decoder.gate.set()
        assert first.result().status_code == 200


def test_killed_clients_leak_neither_rows_nor_memory() -> None:
    """At random places: before, amid and behind the request, and while the answer is read."""
    chance = random.Random(0)
    with serving(FakeDecoder(rows=4, step_s=0.0005), serve_rows=4, serve_queue=1000) as server:
        baseline = 0
        for number in range(KILLED):
            if number == KILLED // 3:
                baseline = _objects(server)
            body = {**LONG, "stream": chance.random() < 0.5, "n": chance.choice([1, 2])}
            message = request(json.dumps(body).encode())
            with connect(server.url) as connection:
                connection.sendall(message[: chance.choice([0, 40, len(message) - 3, None, None])])
                if chance.random() < 0.5:
                    connection.settimeout(chance.random() * 0.02 + 0.001)
                    with contextlib.suppress(TimeoutError):
                        connection.recv(100)
                if chance.random() < 0.5:  # a reset instead of a farewell
                    linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        wait_until(lambda: server.decoder.idle)
        assert not server.engine._runs
        assert post(server.url).status_code == 200
        grown = _objects(server) - baseline
        assert grown < 2 * KILLED, "a request is some hundred objects"


def _objects(server: Any) -> int:
    wait_until(lambda: server.decoder.idle)
    server.decoder.submitted.clear()
    gc.collect()
    return len(gc.get_objects())


def test_a_stop_lets_running_requests_end() -> None:
    with ThreadPoolExecutor(1) as pool, serving() as server:
        server.decoder.gate.clear()
        answer = pool.submit(post, server.url)
        wait_until(lambda: server.decoder.running == 1)
        server.server.stop()
        wait_until(lambda: _refuses(server.url))
        server.decoder.gate.set()
        assert answer.result().json()["choices"][0]["text"] == "abc"


def _refuses(url: str) -> bool:
    try:
        connect(url).close()
    except ConnectionRefusedError:
        return True
    return False


@pytest.mark.parametrize("stream", [False, True])
def test_what_outlives_its_grace_is_told_so(stream: bool) -> None:
    with ThreadPoolExecutor(1) as pool:
        with serving(serve_grace=0.2, seq_length=4096, max_position_embeddings=4096) as server:
            server.decoder.step_s = 0.01
            body = {**LONG, "stream": stream, "max_tokens": 4000, "min_tokens": 4000}
            future = pool.submit(lambda: post(server.url, **body))
            wait_until(lambda: server.decoder.running == 1)
            server.server.stop()
            response = future.result()
        words = "the server is shutting down"
        if stream:
            last = [line for line in response.text.splitlines() if line][-1]
            assert json.loads(last.removeprefix("data: "))["error"]["message"] == words
        else:
            assert (response.status_code, response.json()["error"]["message"]) == (503, words)


def test_a_second_stop_waits_no_longer() -> None:
    with ThreadPoolExecutor(1) as pool, serving(serve_grace=1000.0) as server:
        server.decoder.gate.clear()
        answer = pool.submit(post, server.url)
        wait_until(lambda: server.decoder.running == 1)
        server.server.stop()
        server.server.stop()
        assert answer.result().status_code == 503


def test_health_tells_what_the_engine_does() -> None:
    with serving() as server:
        for state, status in {"ready": 200, "loading": 503, "failed": 503}.items():
            server.engine.state = state  # type: ignore[assignment]
            response = httpx.get(f"{server.url}/health")
            assert (response.status_code, response.json()) == (status, {"status": state})
        server.engine.state = "loading"
        refused = post(server.url)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "unavailable")
        server.engine.state = "ready"


@pytest.mark.parametrize("stream", [False, True])
def test_a_decoder_that_fails_fails_every_request(stream: bool) -> None:
    with serving() as server, ThreadPoolExecutor(1) as pool:
        server.decoder.gate.clear()
        future = pool.submit(lambda: post(server.url, **{**LONG, "stream": stream}))
        wait_until(lambda: server.decoder.running == 1)
        server.decoder.error = ZeroDivisionError()
        server.decoder.gate.set()
        response = future.result()
        assert "engine_failed" in response.text
        assert httpx.get(f"{server.url}/health").json() == {"status": "failed"}
        assert post(server.url).status_code == 503


def test_thirty_clients_get_what_each_would_get_alone() -> None:
    with serving(serve_rows=4) as server:
        alone = {seed: _text(server.url, seed) for seed in range(30)}
        together: dict[int, str] = {}
        threads = [
            threading.Thread(
                target=lambda seed=seed: together.update({seed: _text(server.url, seed)})
            )
            for seed in range(30)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together == alone


def _text(url: str, seed: int) -> str:
    response = post(url, prompt="x", max_tokens=20, seed=seed)
    return response.json()["choices"][0]["text"]
