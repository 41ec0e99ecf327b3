"""What is too much, too large or too slow gets a clean answer, while good clients go on."""

from __future__ import annotations

import json
import select
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from neox.serving.schemas import ChatRequest, CompletionRequest
from tests.serving.fakes import FakeDecoder, Running, serving, wait_until

JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


def post(url: str, path: str = "/v1/completions", **body: Any) -> httpx.Response:
    body = body or {"prompt": "x", "max_tokens": 3, "seed": 0}
    return httpx.post(url + path, json=body, timeout=60)


def connect(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def request(body: bytes, length: int | None = None) -> bytes:
    return (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body) if length is None else length, body)
    )


def send(connection: socket.socket, data: bytes) -> bool:
    """Whether the server took it: it may have answered and closed amid it."""
    try:
        connection.sendall(data)
    except ConnectionError:
        return False
    return True


def read_answer(connection: socket.socket) -> bytes:
    """An answer whose body is an object in an object; the connection stays open."""
    answer = b""
    while not answer.endswith(b"}}"):
        piece = connection.recv(10_000)
        assert piece, answer
        answer += piece
    return answer


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    received = b""
    while data := connection.recv(1 << 16):
        received += data
    return received


def error(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    (name, body), *rest = response.json().items()
    assert (name, rest) == ("error", [])
    assert set(body) == {"message", "type", "param", "code"}
    return body


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b'"text"',
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "x\\udfff"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "x", "\\ud800": 1}',
        b'{"prompt": "x", "stop": "\\ud800"}',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": -Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "temperature": "1"}',
        b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"prompt": "x", "max_tokens": 99999999999999999999}',
        b'{"prompt": "x", "max_tokens": 1.5}',
        b'{"prompt": "x", "max_tokens": true}',
        b'{"prompt": "x", "seed": 99999999999999999999999}',
        b'{"prompt": {"a": 1}}',
        b'{"prompt": [[[1]]]}',
        b'{"prompt": ["x", 1]}',
        b'{"prompt": [true]}',
        b'{"prompt": [99999999999999999999]}',
        b'{"prompt": "x", "stop": [""]}',
        b'{"prompt": "x", "stream": "yes"}',
        b'{"max_tokens": 3}',
    ],
    ids=range(28),
)
def test_hostile_bodies_are_bad_requests(server: Running, body: bytes) -> None:
    response = httpx.post(f"{server.url}/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400
    message = error(response)["message"]
    assert message and len(message) < 300


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["x"] * 100_000 + [1]},
        {"prompt": [[]] * 100_000},
        {"prompt": [["x"] * 100_000]},
        {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(50_000)), "x")},
        {"prompt": "x", **dict.fromkeys(map(str, range(50_000)), 1)},
        {"messages": [{"role": "user", "content": [1] * 100_000}]},
        {"messages": [{"role": "user", "content": "x"} | dict.fromkeys(map(str, range(50_000)))]},
    ],
    ids=range(7),
)
def test_a_body_with_many_mistakes_is_told_of_few(body: dict[str, Any]) -> None:
    """Collecting all of them would take seconds, during which nobody is answered."""
    shape = ChatRequest if "messages" in body else CompletionRequest
    with pytest.raises(ValidationError) as raised:
        shape.model_validate(body)
    assert raised.value.error_count() <= 4


def test_a_body_that_does_not_say_it_is_json(server: Running) -> None:
    response = httpx.post(f"{server.url}/v1/completions", content=b'{"prompt": "x"}')
    assert response.status_code == 400
    assert "Content-Type: application/json" in error(response)["message"]


def test_text_beyond_ascii_goes_in_and_out(server: Running) -> None:
    text = "ü € 𝄞 \u0000 \u2028"
    response = post(server.url, prompt=text, echo=True, max_tokens=1, seed=0)
    assert response.json()["choices"][0]["text"] == text + "a"


def test_a_body_may_have_so_many_bytes() -> None:
    with serving(serve_max_body=1000, serve_io_timeout=60.0) as server:
        assert post(server.url, prompt="x" * 400, max_tokens=1).status_code == 200
        assert error(post(server.url, prompt="x" * 1000))["code"] == "body_too_large"

        def chunks() -> Iterator[bytes]:  # without Content-Length
            yield b'{"prompt": "'
            for _ in range(20):
                yield b"x" * 100

        response = httpx.post(f"{server.url}/v1/completions", content=chunks(), headers=JSON)
        assert response.status_code == 413
        with connect(server.url) as connection:  # refused before any of it is sent
            connection.sendall(request(b"", length=10**12))
            assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
        assert post(server.url).status_code == 200


def test_prompts_and_answers_may_have_so_many_tokens() -> None:
    with serving(serve_max_prompt_tokens=10, serve_max_tokens=5) as server:
        assert post(server.url, prompt="x" * 10, max_tokens=5).status_code == 200
        assert "may have 10" in error(post(server.url, prompt="x" * 11))["message"]
        assert "room for 5" in error(post(server.url, prompt="x", max_tokens=6))["message"]
        assert len(post(server.url, prompt="x", seed=0).json()["choices"][0]["text"]) == 5


def test_a_full_queue_turns_away_and_says_when_to_come_again() -> None:
    with serving(serve_rows=1, serve_queue=1) as server, ThreadPoolExecutor(2) as pool:
        server.decoder.gate.clear()
        admitted = [pool.submit(post, server.url) for _ in range(2)]
        wait_until(lambda: len(server.decoder.submitted) == 2)
        for response in (post(server.url), post(server.url, prompt="x", stream=True)):
            assert (response.status_code, error(response)["code"]) == (503, "queue_full")
            assert response.headers["retry-after"] == "1"
        old = post(server.url, "/complete", context="x")
        assert (old.status_code, old.json()) == (503, {"error": "queue full, try again later"})
        server.decoder.gate.set()
        assert [future.result().status_code for future in admitted] == [200, 200]


def test_an_answer_that_takes_too_long_is_cancelled() -> None:
    with serving(serve_request_timeout=0.2) as server:
        server.decoder.gate.clear()
        response = post(server.url)
        assert (response.status_code, error(response)["code"]) == (504, "timeout")
        # Where text has been sent, the error is the last event. All of it would take 12 s.
        server.engine.request_timeout = 2.0
        server.decoder.gate.set()
        server.decoder.step_s = 0.03
        body = {"prompt": "x", "max_tokens": 400, "seed": 0, "min_tokens": 400, "stream": True}
        lines = [line for line in post(server.url, **body).text.splitlines() if line]
        assert json.loads(lines[0].removeprefix("data: "))["choices"][0]["text"] == "a"
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        wait_until(lambda: server.decoder.idle)
        assert len(server.decoder.cancelled) == 2


@pytest.mark.parametrize(
    "sent", [b"", b"POST /v1/completions HT", request(b'{"prompt": ', length=100)]
)
def test_who_sends_too_slowly_is_told_and_cut_off(sent: bytes) -> None:
    with serving(serve_io_timeout=0.5) as server, connect(server.url) as connection:
        connection.sendall(sent)
        assert read_all(connection).startswith(b"HTTP/1.1 408 Request Timeout\r\n")
        assert post(server.url).status_code == 200


def test_a_second_request_on_a_connection_has_its_own_time() -> None:
    with serving(serve_io_timeout=0.5) as server, connect(server.url) as connection:
        connection.sendall(request(b'{"prompt": "x", "max_tokens": 1}'))
        assert read_answer(connection).startswith(b"HTTP/1.1 200 OK\r\n")
        connection.sendall(b"POST /v1/compl")
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")


def test_trickling_does_not_buy_time() -> None:
    with serving(serve_io_timeout=0.4) as server, connect(server.url) as connection:
        for byte in request(b'{"prompt": ' + b" " * 1000):  # more than there is time for
            if not send(connection, bytes([byte])) or select.select([connection], [], [], 0.05)[0]:
                break
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_who_reads_too_slowly_is_cut_off_and_frees_its_row() -> None:
    limits: dict[str, Any] = {"seq_length": 200_000, "max_position_embeddings": 200_000}
    body = {"prompt": "x", "stream": True, "max_tokens": 190_000, "min_tokens": 190_000}
    with (
        serving(serve_io_timeout=0.5, serve_rows=1, **limits) as server,
        connect(server.url) as connection,
    ):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(request(json.dumps(body).encode()))
        wait_until(lambda: server.decoder.cancelled)
        assert post(server.url).status_code == 200


@pytest.mark.parametrize(
    "sent", [b"POST /v1/completions HTTP/1.1\r\nX: ", request(b'{"prompt": ', length=100)]
)
def test_slow_connections_make_room_for_good_clients(sent: bytes) -> None:
    with serving(serve_connections=4, serve_io_timeout=60.0) as server:
        slow = [connect(server.url) for _ in range(40)]
        for connection in slow:
            connection.sendall(sent)
        for _ in range(5):
            assert post(server.url).status_code == 200
        # Those whose request was refused are closed like those that have none.
        wait_until(lambda: sum(map(_is_closed, slow)) >= 32)
        for connection in slow:
            connection.close()


def test_clients_that_come_at_once_are_answered() -> None:
    with serving(serve_connections=8, serve_io_timeout=60.0) as server:
        clients = [connect(server.url) for _ in range(16)]
        for client in clients:
            client.sendall(request(b'{"prompt": "x", "max_tokens": 1}'))
        for client in clients:
            assert client.recv(1000)[9:12] in (b"200", b"503")
            client.close()


def test_slow_connections_do_not_end_those_of_good_clients() -> None:
    with serving(serve_connections=4, serve_io_timeout=60.0) as server, connect(server.url) as good:
        for _ in range(2):
            good.sendall(request(b'{"prompt": "x", "max_tokens": 1}'))
            read_answer(good)
            _crowd(server.url)


def _crowd(url: str) -> None:
    """20 connections that say nothing, until all but twice the 4 that may be are closed."""
    silent = [connect(url) for _ in range(20)]
    wait_until(lambda: sum(map(_is_closed, silent)) >= 12)
    for connection in silent:
        connection.close()


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.01)
    try:
        while connection.recv(1 << 16):
            pass  # it was told why
        return True
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_so_many_requests_at_a_time() -> None:
    with serving(serve_connections=2) as server, ThreadPoolExecutor(2) as pool:
        server.decoder.gate.clear()
        running = [pool.submit(post, server.url) for _ in range(2)]
        wait_until(lambda: len(server.decoder.submitted) == 2)
        assert httpx.get(f"{server.url}/health").status_code == 503
        server.decoder.gate.set()
        assert [future.result().status_code for future in running] == [200, 200]
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_ten_times_overload_is_turned_away_while_good_clients_go_on() -> None:
    decoder = FakeDecoder(rows=4, step_s=0.002)
    rows, queue = 4, 8
    with serving(decoder, serve_rows=rows, serve_queue=queue) as server:
        statuses: list[int] = []
        ended = threading.Event()

        def flood() -> None:
            with httpx.Client(timeout=60) as client:
                while not ended.is_set():
                    body = {"prompt": "x", "max_tokens": 20, "min_tokens": 20}
                    response = client.post(f"{server.url}/v1/completions", json=body)
                    statuses.append(response.status_code)

        threads = [threading.Thread(target=flood) for _ in range(10 * rows)]
        for thread in threads:
            thread.start()
        try:
            good = [_insist(server.url) for _ in range(10)]
        finally:
            ended.set()
            for thread in threads:
                thread.join()
        assert good == ["abc"] * 10
        assert set(statuses) == {200, 503}
        assert post(server.url).status_code == 200
        assert decoder.idle


def _insist(url: str) -> str:
    """As a well-behaved client does: come again after a 503."""
    texts: list[str] = []

    def answered() -> bool:
        response = post(url)
        assert response.status_code in (200, 503)
        if response.status_code == 200:
            texts.append(response.json()["choices"][0]["text"])
        return bool(texts)

    wait_until(answered, seconds=60)
    return texts[0]


def test_other_origins_are_let_in_by_name_only(server: Running) -> None:
    ask = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    assert httpx.options(f"{server.url}/v1/completions", headers=ask).status_code == 405
    with serving(serve_cors_origins=["http://page.example"], keys=("k",)) as open_server:
        url = f"{open_server.url}/v1/completions"
        allowed = httpx.options(url, headers=ask).headers
        assert allowed["access-control-allow-origin"] == "http://page.example"
        refused = httpx.post(url, headers={"Origin": "http://page.example"}, json={})
        assert refused.status_code == 401  # and the page may read why
        assert refused.headers["access-control-allow-origin"] == "http://page.example"
        other = httpx.post(url, headers={"Origin": "http://other.example"}, json={})
        assert "access-control-allow-origin" not in other.headers


def test_keys_guard_everything_but_the_page_and_health() -> None:
    with serving(keys=("k",)) as server:
        status = {
            path: httpx.get(server.url + path).status_code
            for path in ("/", "/health", "/metrics", "/v1/models", "/openapi.json", "/nowhere")
        }
        assert status == {
            "/": 200, "/health": 200,
            "/metrics": 401, "/v1/models": 401, "/openapi.json": 401, "/nowhere": 401,
        }  # fmt: skip
        key = {"Authorization": "Bearer k"}
        assert httpx.get(f"{server.url}/metrics", headers=key).status_code == 200
        for wrong in (b"Basic k", b"Bearer", b"k", b"Bearer kk", b"Bearer k\xff"):
            headers = {b"Authorization": wrong}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 401


def test_what_is_not_http_is_refused(server: Running) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"GET / HTTP/9\r\n\r\n", b"A" * 100_000):
        with connect(server.url) as connection:
            send(connection, sent)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400 ")
