"""./deepy.py serve.py, from the weights to an answer to the end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from neox.checkpoint.peft import write_adapters
from tests import models, small_tokenizer
from tests.checkpoint.peft_folders import random_adapters

REPOSITORY = Path(__file__).parents[2]
COMMAND = [sys.executable, REPOSITORY / "deepy.py", "serve.py", "tiny.yml"]
PATIENCE_S = 180.0  # for processes on a busy machine; nothing is measured with it
ADDRESS = re.compile(r"serving (\S+)(?:, poet)? at (http://\S+)")
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"


def write(folder: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
    """A model of random weights, its tokenizer with a chat template, and tiny.yml."""
    sizes = {"seq_length": 64, "max_position_embeddings": 64}
    tokenizer = small_tokenizer.write(folder)
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    monkeypatch.setattr(models, "VOCAB", 320)  # for the tokenizer's 280
    models.write_model(folder / "checkpoints", 4, **sizes)
    served = {"load": str(folder / "checkpoints"), "vocab_file": str(tokenizer), "serve_port": 0}
    config = {**models.BASE, **sizes, **served, "tokenizer_type": "HFTokenizer"} | values
    (folder / "tiny.yml").write_text(json.dumps(config))
    adapters = random_adapters(models.config_of(**sizes), alpha=20)
    (folder / "poet").mkdir()
    write_adapters(folder / "poet", models.config_of(**sizes), adapters, None)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of tiny.yml and its address."""
    process = subprocess.Popen(
        COMMAND,
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = []
        while (line := process.stdout.readline()) and not ADDRESS.search(line):
            lines.append(line)
        found = ADDRESS.search(line)
        assert found is not None, (lines, process.stderr and process.stderr.read())
        assert found[1] == "tiny"
        yield process, found[2]
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


ADAPTERS = {"poet": "poet"}


@pytest.mark.parametrize("grid", [{}, {"model_parallel_size": 2, "adapters": ADAPTERS}])
def test_it_serves_until_it_is_asked_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: dict[str, Any]
) -> None:
    write(tmp_path, monkeypatch, **grid)
    with serving(tmp_path) as (process, url):
        wait_until_ready(url)
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        ask: Any = {"model": "tiny", "max_tokens": 8, "temperature": 0}
        texts = [
            client.completions.create(prompt="It was", extra_body={"min_tokens": 8}, **ask)
            .choices[0].text
            for _ in range(2)
        ]  # fmt: skip
        assert texts[0] == texts[1]
        streamed = client.completions.create(
            prompt="It was", stream=True, extra_body={"min_tokens": 8}, **ask
        )
        assert "".join(chunk.choices[0].text for chunk in streamed) == texts[0]
        if "adapters" in grid:
            assert [model.id for model in client.models.list()] == ["tiny", "poet"]
            asked = ask | {"model": "poet", "prompt": "It was"}
            poet = client.completions.create(extra_body={"min_tokens": 8}, **asked)
            assert poet.choices[0].text != texts[0]
        turns: Any = [{"role": "user", "content": "It was"}]
        chat = client.chat.completions.create(messages=turns, logprobs=True, **ask)
        assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content
        _another_cannot_have_the_port(tmp_path, url.rpartition(":")[2])
        process.send_signal(signal.SIGTERM)
        output, errors = process.communicate(timeout=PATIENCE_S)
        assert (process.returncode, errors) == (0, "")
        assert output.splitlines()[-1] == "stopped"


def _another_cannot_have_the_port(folder: Path, port: str) -> None:
    second = subprocess.run(
        [*COMMAND, "--set", f"serve_port={port}"],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert second.returncode == 2
    assert second.stderr == (
        f"error: serve_host 127.0.0.1, serve_port {port}: cannot listen there: Address already in "
        "use; name another with --set serve_port=PORT\n"
    )


def wait_until_ready(url: str) -> None:
    """The port is open while the weights are loaded."""
    for _ in range(1000):
        response = httpx.get(f"{url}/health", timeout=60)
        if response.json() == {"status": "ready"}:
            return
        assert response.json() == {"status": "loading"}
    raise AssertionError("never ready")
