"""tools/fetch.py against a hub and against a server of the slim weights."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.manifest import MANIFEST, Manifest
from tests.tools.server import BODY, HALF, Site, publish_on_hub, serving
from tools import fetch, published

MODEL = {
    "config.json": b'{"model_type": "gpt_neox"}',
    "tokenizer.json": b"{}",
    "pytorch_model.bin": b"the same weights",
    "flax_model.msgpack": b"the same weights",
    "README.md": b"# A model",
    "model.safetensors": BODY,
}


def run(*arguments: object) -> int:
    return fetch.main([str(argument) for argument in arguments], wait=lambda seconds: None)


@pytest.fixture
def hub(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A hub with the model own/small."""
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    publish_on_hub(site, "own/small", "main", MODEL)
    return site


def test_a_model_of_the_hub_becomes_a_folder(
    hub: Site, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run("own/small", "--output", tmp_path) == 0
    fetched = {path.name for path in tmp_path.iterdir()}
    assert fetched == {"config.json", "tokenizer.json", "model.safetensors", "fetched.json"}
    for name in fetched - {"fetched.json"}:
        assert (tmp_path / name).read_bytes() == MODEL[name]
    assert f"{tmp_path}: 3 files, 100.0 kB; sizes and checksums are the hub's" in (
        capsys.readouterr().out
    )


def test_what_is_finished_is_not_fetched_again(hub: Site, tmp_path: Path) -> None:
    assert run("own/small", "--output", tmp_path) == 0
    (tmp_path / "config.json").unlink()
    hub.requests.clear()
    assert run("own/small", "--output", tmp_path) == 0
    fetched = [request.path for request in hub.requests if request.path.startswith("/cdn")]
    assert fetched == ["/cdn/config.json"]


@pytest.mark.parametrize("recorded", [True, False])
def test_a_file_that_is_there_and_was_touched_is_read_again(
    hub: Site, tmp_path: Path, recorded: bool, capsys: pytest.CaptureFixture
) -> None:
    assert run("own/small", "--output", tmp_path) == 0
    if not recorded:
        (tmp_path / "fetched.json").write_text("{")
    (tmp_path / "tokenizer.json").write_bytes(MODEL["tokenizer.json"])  # by hand, and right
    (tmp_path / "model.safetensors").write_bytes(BODY[::-1])
    hub.requests.clear()
    assert run("own/small", "--output", tmp_path) == 0
    fetched = [request.path for request in hub.requests if request.path.startswith("/cdn")]
    assert fetched == ["/cdn/model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == BODY
    assert "model.safetensors is not what is published" in capsys.readouterr().err


def test_another_revision_replaces_the_files(hub: Site, tmp_path: Path) -> None:
    assert run("own/small", "--output", tmp_path) == 0
    publish_on_hub(hub, "own/small", "step1", MODEL | {"model.safetensors": BODY[::-1]})
    assert run("own/small", "--revision", "step1", "--output", tmp_path) == 0
    assert (tmp_path / "model.safetensors").read_bytes() == BODY[::-1]


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (
            [
                "model-00001-of-00002.safetensors",
                "model-00002-of-00002.safetensors",
                "model.safetensors.index.json",
                "pytorch_model.bin.index.json",
                "tf_model.h5",
            ],
            3,
        ),
        (["pytorch_model.bin", "flax_model.msgpack", "rust_model.ot"], 1),
        (["pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json", "x.safetensors"], 2),
    ],
)
def test_one_kind_of_weights_is_fetched(
    hub: Site, tmp_path: Path, there: list[str], wanted: int
) -> None:
    publish_on_hub(hub, "own/other", "main", {name: name.encode() for name in there})
    assert run("own/other", "--output", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*there[:wanted], "fetched.json"}


def test_a_model_without_weights_is_refused(
    hub: Site, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    publish_on_hub(hub, "own/other", "main", {"config.json": b"{}", "model.gguf": b"weights"})
    assert run("own/other", "--output", tmp_path) == 2
    assert "has no weights that are read here" in capsys.readouterr().err


def test_a_damaged_small_file_is_found_by_gits_checksum(
    hub: Site, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.faults["/cdn/config.json"] = [("flip",)]
    assert run("own/small", "--output", tmp_path) == 0
    assert (tmp_path / "config.json").read_bytes() == MODEL["config.json"]
    assert "its git-sha1 is" in capsys.readouterr().err


def test_the_token_goes_to_the_hub_and_no_further(
    hub: Site, mirror: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.redirects["/own/small/resolve/main/model.safetensors"] = f"{mirror.url}/w"
    assert run("own/small", "--output", tmp_path) == 0
    for request in hub.requests:
        assert request.headers.get("Authorization") == "Bearer secret"
    assert mirror.requests and all("Authorization" not in r.headers for r in mirror.requests)


def test_a_mirror_of_the_hub_is_asked_first(
    hub: Site, mirror: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    publish_on_hub(mirror, "own/small", "main", MODEL)
    del mirror.files["/cdn/tokenizer.json"]
    assert run("own/small", "--output", tmp_path, "--mirror", f"{mirror.url}/") == 0
    assert {request.path for request in hub.requests} == {
        "/own/small/resolve/main/tokenizer.json",
        "/cdn/tokenizer.json",
    }
    assert all("Authorization" not in request.headers for request in mirror.requests)


@pytest.mark.parametrize(
    ("answer", "said"),
    [(None, "HTTP 404 Not Found"), (b"<html>", "not a list"), (b'{"error": 1}', "not a list")],
)
def test_a_model_that_is_not_there_is_named(
    hub: Site, tmp_path: Path, capsys: pytest.CaptureFixture, answer: bytes | None, said: str
) -> None:
    if answer is not None:
        hub.files["/api/models/EleutherAI/pythia-70/tree/main"] = answer
    assert run("pythia-70", "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: EleutherAI/pythia-70 at revision main cannot be listed:\n")
    assert said in error and "HF_TOKEN" in error and "--mirror" in error


@pytest.mark.parametrize(
    ("arguments", "repository", "revision", "folder"),
    [
        (["pythia-1.4b-deduped"], "EleutherAI/pythia-1.4b-deduped", "main", "pythia-1.4b-deduped"),
        (
            ["pythia-70m", "--revision", "step0"],
            "EleutherAI/pythia-70m",
            "step0",
            "pythia-70m-step0",
        ),
        (["gpt-j-6B"], "EleutherAI/gpt-j-6B", "float16", "gpt-j-6B"),
        (["own/small", "--revision", "a/b"], "own/small", "a%2Fb", "small-a-b"),
    ],
)
def test_a_dry_run_lists_and_fetches_nothing(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    arguments: list[str],
    repository: str,
    revision: str,
    folder: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", site.url)
    publish_on_hub(site, repository, revision, MODEL)
    assert run(*arguments, "--dry_run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == " 100.0 kB  model.safetensors"
    assert lines[-1] == f" 100.0 kB  3 files, to checkpoints/{folder}"
    assert not list(tmp_path.iterdir())


def test_too_little_room_is_said_before_anything_is_fetched(
    hub: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def usage(path: Path) -> Any:
        return shutil._ntuple_diskusage(10**9, 10**9 - 40_000, 40_000)

    monkeypatch.setattr(fetch.shutil, "disk_usage", usage)
    assert run("own/small", "--output", tmp_path / "new") == 2
    assert "100.0 kB are yet to come and 40.0 kB are free" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    (tmp_path / "model.safetensors").write_bytes(BODY)
    assert run("own/small", "--output", tmp_path) == 0


def test_control_c_stops_and_the_same_command_goes_on(
    hub: Site, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    hub.faults["/cdn/model.safetensors"] = [("drop", HALF)]
    ended = threading.Event()

    def wait(seconds: float) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        ended.wait()

    assert fetch.main(["own/small", "--output", str(tmp_path)], wait=wait) == 130
    ended.set()
    assert "the same command goes on from here" in capsys.readouterr().err
    assert not (tmp_path / "model.safetensors").exists()
    hub.requests.clear()
    assert run("own/small", "--output", tmp_path) == 0
    assert [r.range for r in hub.gets("/cdn/model.safetensors")] == [f"bytes={HALF}-"]
    assert (tmp_path / "model.safetensors").read_bytes() == BODY


def test_two_at_once_are_refused(hub: Site, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert run("own/small", "--output", tmp_path) == 2
    assert f"{tmp_path}: another fetch is at work there" in capsys.readouterr().err
    os.close(handle)
    assert run("own/small", "--output", tmp_path) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["20B", "--revision", "main"], "EleutherAI/gpt-neox-20b has"),
        (["a/b/c"], "neither a model's name nor OWNER/REPO"),
        (["own/small", "--mirror", "ftp://x"], "--mirror: ftp://x is no URL"),
        (["own/small", "--jobs", "0"], "--jobs: 0 is below 1"),
    ],
)
def test_bad_words_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit) as raised:
        run(*arguments)
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def slim(site: Site, monkeypatch: pytest.MonkeyPatch) -> Site:
    """The files of the slim weights, each with a tensor in it that is its own."""
    monkeypatch.setattr(fetch, "SLIM_20B", (site.url,))
    for number, path in enumerate(published.FILES_20B):
        buffer = io.BytesIO()
        torch.save({"weight": torch.full((4,), number)}, buffer)
        site.files[f"/{path}"] = buffer.getvalue()
    return site


def test_the_slim_weights_become_a_checkpoint(
    slim: Site, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    layer = f"{published.STEP_20B}/layer_17-model_01-model_states.pt"
    slim.faults[f"/{layer}"] = [("drop", 500), ("flip",)]  # the file's own checksums find it
    (tmp_path / published.STEP_20B).mkdir()
    (tmp_path / published.STEP_20B / "mp_rank_00_model_states.pt").write_bytes(b"by hand")
    assert run("20B", "--output", tmp_path) == 0
    said = capsys.readouterr()
    assert "95 files" in said.out and "no others are published" in said.out
    (warned,) = [line for line in said.err.splitlines() if "trying again" not in line]
    assert f"{layer} arrived damaged" in warned
    for path in published.FILES_20B:
        assert (tmp_path / path).read_bytes() == slim.files[f"/{path}"]
    assert (tmp_path / "latest").read_text() == "global_step150000"
    step = tmp_path / published.STEP_20B
    manifest = Manifest.read(step)
    assert manifest is not None
    assert (manifest.iteration, manifest.grid["tp"], manifest.padded_vocab_size) == (
        150000,
        2,
        50432,
    )
    assert manifest.architecture["num_layers"] == 44
    files = {path for path in step.iterdir() if path.name != MANIFEST}
    assert {path.name for path in files} == set(manifest.files)
    for path in files:
        manifest.check(path)


def test_the_checksums_of_a_server_are_held_against_the_slim_weights(
    slim: Site, mirror: Site, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sums = {path: slim.files[f"/{path}"] for path in published.FILES_20B}
    publish_sums(mirror, sums | {"20B_tokenizer.json": b"another"})
    assert run("20B", "--output", tmp_path, "--mirror", mirror.url) == 2
    error = capsys.readouterr().err
    assert "20B_tokenizer.json (" in error and "could not be fetched" in error
    assert "it arrived damaged, twice: its sha256 is" in error
    publish_sums(mirror, sums)
    assert run("20B", "--output", tmp_path, "--mirror", mirror.url) == 0
    assert "the server's SHA256SUMS are right" in capsys.readouterr().out


def publish_sums(site: Site, files: dict[str, bytes]) -> None:
    lines = [f"{hashlib.sha256(body).hexdigest()}  ./{path}\n" for path, body in files.items()]
    site.files["/SHA256SUMS"] = "".join(lines).encode()


def test_a_file_that_no_server_has_is_named(
    slim: Site, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    missing = published.FILES_20B[5]
    del slim.files[f"/{missing}"]
    assert run("20B", "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert f"{missing} is on no server" in error and "HTTP 404" in error


def test_servers_that_do_not_answer_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    with serving(Site()) as closed:
        pass
    monkeypatch.setattr(fetch, "SLIM_20B", (closed.url,))
    assert run("20B", "--output", tmp_path) == 2
    error = capsys.readouterr().err
    assert "no server of the 20B weights answers" in error
    assert "Connection refused (6 attempts)" in error
