"""What is settled before a server answers: address, keys, names, limits; and what it shows."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path

import httpx
import pytest

from neox.config import from_dict, load_config
from neox.errors import ConfigError
from neox.parallel.groups import ProcessGroups
from neox.serving import run
from neox.serving.page import FILES, HEADERS
from neox.serving.server import address, is_loopback, listen, read_keys
from neox.tokenizer import load_tokenizer
from tests.models import BASE
from tests.serving.fakes import config, serving, wait_until
from tests.serving.test_limits import post


def test_a_port_that_is_taken_is_an_error_before_anything_is_loaded() -> None:
    def load() -> None:
        raise AssertionError("loaded")

    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        settings = config(serve_port=port)
        tokenizer = load_tokenizer("CharLevelTokenizer")
        with pytest.raises(ConfigError, match=f"serve_port {port}.*Address already in use"):
            run.serve(settings, ProcessGroups.single(), tokenizer, load)  # type: ignore[arg-type]


def test_a_server_that_cannot_begin_says_why_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_loop(main: Coroutine[None, None, None]) -> None:
        main.close()
        raise OSError("too many open files")

    def load() -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("neox.serving.server.asyncio.run", no_loop)
    settings = config(serve_port=0)
    with pytest.raises(OSError, match="too many open files"):
        run.serve(settings, ProcessGroups.single(), load_tokenizer("CharLevelTokenizer"), load)  # type: ignore[arg-type]


def test_an_address_that_is_nobody_s() -> None:
    with pytest.raises(ConfigError, match=r"serve_host nowhere\.invalid.*name an address"):
        listen("nowhere.invalid", 0)


def test_addresses() -> None:
    for host, shown in {"127.0.0.1": "127.0.0.1", "0.0.0.0": "localhost"}.items():
        with listen(host, 0) as listener:
            assert address(listener, host) == f"http://{shown}:{listener.getsockname()[1]}"
    assert [is_loopback(host) for host in ("127.0.0.9", "::1", "localhost")] == [True] * 3
    assert [is_loopback(host) for host in ("0.0.0.0", "192.0.2.1", "example.org")] == [False] * 3


def test_keys_come_from_a_file_and_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("\ufeff# for the team\n one \n\ntwo\n")  # as some editors begin a file
    monkeypatch.delenv("NEOX_API_KEYS", raising=False)
    assert read_keys(None) == []
    assert read_keys(str(file)) == ["one", "two"]
    monkeypatch.setenv("NEOX_API_KEYS", "three, four,")
    assert read_keys(str(file)) == ["three", "four", "one", "two"]
    file.write_text("# none\n")
    with pytest.raises(ConfigError, match="has no keys"):
        read_keys(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(str(tmp_path))


def test_strangers_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    for host, keys in (("127.0.0.1", []), ("0.0.0.0", ["k"])):
        run._warn_of_strangers(config(serve_host=host), keys)
    assert capsys.readouterr().err == ""
    run._warn_of_strangers(config(serve_host="0.0.0.0"), [])
    assert "can be reached from other machines" in capsys.readouterr().err


def test_the_startup_lines_can_be_pasted_and_hold_no_key(
    capsys: pytest.CaptureFixture[str],
) -> None:
    service = run.build_service(config(), load_tokenizer("CharLevelTokenizer"))
    run._announce("http://127.0.0.1:8000", service, True)
    first, command = capsys.readouterr().out.splitlines()
    assert first == "serving model at http://127.0.0.1:8000"
    assert "-H 'Authorization: Bearer KEY'" in command


def test_names_and_limits(tmp_path: Path) -> None:
    (tmp_path / "tiny.yml").write_text("{num_layers: 2, hidden_size: 32, num_attention_heads: 4,")
    with (tmp_path / "tiny.yml").open("a") as file:
        file.write("seq_length: 64, max_position_embeddings: 64}")
    assert run.model_name(load_config([tmp_path / "tiny.yml"])) == "tiny"
    assert run.max_length(config()) == 512
    assert run.max_length(config(serve_max_tokens=9)) == 512
    assert run.max_length(config(serve_max_tokens=9, serve_max_prompt_tokens=20)) == 29
    assert run.max_length(config(serve_max_tokens=500, serve_max_prompt_tokens=20)) == 512


def test_what_the_configuration_must_not_say() -> None:
    with pytest.raises(ConfigError, match=r"adapters\.model: model is the name of the model"):
        run.check_names(config(adapters={"model": "adapters/poet"}))
    served = {**BASE, "load": ".", "tokenizer_type": "CharLevelTokenizer"}
    for values, words in [
        ({"serve_max_prompt_tokens": 16}, "leaves no room to generate in seq_length"),
        ({"adapters": {"poet": 5}}, "adapters.poet is 5, but it must be the path"),
        ({"adapters": {"poet": "p"}, "adapter": "q"}, 'adapter is "q", part of the model that is'),
    ]:
        with pytest.raises(ConfigError, match=words):
            from_dict({**served, **values}, purpose="serve")
    with pytest.raises(ConfigError, match="serves one copy of the model, of 1 processes"):
        from_dict(served, purpose="serve", world_size=2)


def test_metrics_count_what_happened() -> None:
    with serving(serve_rows=1) as server:
        post(server.url, prompt="xyz", max_tokens=4, min_tokens=4)
        post(server.url, prompt="x", max_tokens=0)
        httpx.get(f"{server.url}/v1/models/nothing")
        httpx.get(f"{server.url}/a/{'b' * 50}")
        server.decoder.gate.clear()
        lines = httpx.get(f"{server.url}/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        expected = {
            'neox_requests_total{route="/v1/completions",status="200"}': "1.0",
            'neox_requests_total{route="/v1/completions",status="400"}': "1.0",
            'neox_requests_total{route="/v1/models/{model:path}",status="404"}': "1.0",
            'neox_requests_total{route="other",status="404"}': "1.0",
            "neox_prompt_tokens_total": "3.0",
            "neox_generated_tokens_total": "4.0",
            "neox_time_to_first_token_seconds_count": "1.0",
            "neox_time_per_token_seconds_count": "3.0",
            "neox_queue_length": "0.0",
            "neox_running_rows": "0.0",
            "neox_cancellations_total": "0.0",
        }
        assert {name: values.get(name) for name in expected} == expected


def test_the_page_is_served_with_its_headers_and_needs_no_key() -> None:
    with serving(keys=("k",)) as server:
        for path, (file, media_type) in FILES.items():
            response = httpx.get(server.url + path)
            assert (response.content, response.status_code) == (file.read_bytes(), 200)
            assert response.headers["content-type"] == media_type
            assert (
                HEADERS.items()
                <= {name.title(): value for name, value in response.headers.items()}.items()
            )


def test_a_bug_is_an_answer_and_on_the_console(caplog: pytest.LogCaptureFixture) -> None:
    with serving() as server:
        server.service.tokenizer.tokenize = lambda text: 1 // 0  # type: ignore[method-assign]
        response = post(server.url)
        assert response.status_code == 500
        assert response.json()["error"]["message"] == "internal error"
        wait_until(lambda: server.decoder.idle)
    assert "ZeroDivisionError" in caplog.text
