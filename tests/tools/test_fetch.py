"""tools/fetch.py against a server that drops, truncates, damages, refuses and redirects."""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import resource
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from neox.checkpoint.manifest import MANIFEST, Manifest
from neox.errors import CheckpointError
from tests.tools.server import Site, publish_on_hub, serving
from tools import fetch, published
from tools.download import ATTEMPTS, Client, RemoteFile

BODY = hashlib.shake_256(b"weights").digest(100_000)
HALF = len(BODY) // 2


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site({"/w": BODY})) as site:
        yield site


@pytest.fixture
def mirror() -> Iterator[Site]:
    with serving(Site({"/w": BODY})) as site:
        yield site


def sha256(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def remote(*sites: Site, **values: Any) -> RemoteFile:
    """BODY as w, whose source publishes a checksum."""
    published: dict[str, Any] = {"path": "w", "bytes": len(BODY), "digest": sha256(BODY)}
    published["urls"] = tuple(f"{site.url}/w" for site in sites)
    return RemoteFile(**published | values)


def without_digest(*sites: Site) -> RemoteFile:
    return remote(*sites, digest=None, version=sites[0].etag(BODY))


class Transfer:
    """One fetch, with what it waited for and what its progress bar would show."""

    def __init__(self, file: RemoteFile, folder: Path) -> None:
        self.waits: list[float] = []
        self.shown = file.part(folder).stat().st_size if file.part(folder).exists() else 0
        Client(self.waits.append).fetch(file, folder, self.report)

    def report(self, count: int) -> None:
        self.shown += count


def check(folder: Path) -> None:
    """BODY is in place and nothing else is there."""
    assert [path.name for path in folder.iterdir()] == ["w"]
    assert (folder / "w").read_bytes() == BODY


@pytest.mark.parametrize("kind", ["drop", "reset"])
@pytest.mark.parametrize("describe", [remote, without_digest])
def test_a_dropped_connection_goes_on_at_the_byte_where_it_ended(
    site: Site, tmp_path: Path, kind: str, describe: Any
) -> None:
    site.faults["/w"] = [("drop", 30_000), (kind, 20_000)]
    transfer = Transfer(describe(site), tmp_path)
    check(tmp_path)
    first, second, third = (request.range for request in site.gets("/w"))
    assert (first, second) == (None, "bytes=30000-")
    # What a reset connection had brought may be lost.
    assert third == "bytes=50000-" or kind == "reset"
    assert transfer.shown == len(BODY)
    assert len(transfer.waits) == 2


def test_attempts_count_only_while_no_byte_comes(site: Site, tmp_path: Path) -> None:
    site.faults["/w"] = [("drop", 1000)] * 3 * ATTEMPTS
    transfer = Transfer(remote(site), tmp_path)
    check(tmp_path)
    assert all(wait <= 2 for wait in transfer.waits)


def test_waits_grow_and_come_to_an_end(site: Site, tmp_path: Path) -> None:
    site.faults["/w"] = [("drop", 0)] * 100
    waits: list[float] = []
    with pytest.raises(CheckpointError, match=r"ended at byte 0 of 100,000 \(6 attempts\)"):
        Client(waits.append).fetch(remote(site), tmp_path, lambda count: None)
    assert len(site.gets("/w")) == ATTEMPTS
    for i, wait in enumerate(waits, start=1):
        assert 2**i / 2 <= wait <= 2**i


def test_a_server_without_ranges_starts_the_file_again(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    remote(site).part(tmp_path).write_bytes(b"x" * HALF)
    site.faults["/w"] = [("drop", 100)]
    assert Transfer(remote(site), tmp_path).shown == len(BODY)
    check(tmp_path)
    assert len(site.gets("/w")) == 2


def test_a_server_without_ranges_that_always_drops_is_given_up(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.faults["/w"] = [("drop", HALF), ("drop", 100)] * 50
    with pytest.raises(CheckpointError, match="attempts"):
        Transfer(remote(site), tmp_path)
    assert len(site.gets("/w")) < 3 * ATTEMPTS


def test_a_part_without_digest_or_etag_is_not_gone_on_with(site: Site, tmp_path: Path) -> None:
    site.faults["/w"] = [("drop", HALF)]
    transfer = Transfer(remote(site, digest=None), tmp_path)
    check(tmp_path)
    assert [request.range for request in site.gets("/w")] == [None, None]
    assert transfer.shown == len(BODY)


def test_a_later_run_goes_on_with_the_part(site: Site, tmp_path: Path) -> None:
    file = remote(site)
    file.part(tmp_path).write_bytes(BODY[:HALF])
    assert Transfer(file, tmp_path).shown == len(BODY)
    check(tmp_path)
    assert [request.range for request in site.gets("/w")] == [f"bytes={HALF}-"]


def test_a_whole_part_is_verified_and_not_asked_for(site: Site, tmp_path: Path) -> None:
    remote(site).part(tmp_path).write_bytes(BODY)
    Transfer(remote(site), tmp_path)
    check(tmp_path)
    assert not site.requests


def test_a_part_of_another_version_is_dropped(site: Site, tmp_path: Path) -> None:
    older = remote(site, digest=None, version='"older"')
    older.part(tmp_path).write_bytes(b"x" * HALF)
    Transfer(without_digest(site), tmp_path)
    check(tmp_path)
    assert [request.range for request in site.gets("/w")] == [None]


def test_a_file_that_changes_on_the_server_meanwhile_is_started_again(
    site: Site, tmp_path: Path
) -> None:
    file = without_digest(site)
    file.part(tmp_path).write_bytes(b"x" * HALF)
    site.files["/w"] = BODY[::-1]
    assert Transfer(file, tmp_path).shown == len(BODY)
    assert (tmp_path / "w").read_bytes() == BODY[::-1]
    assert site.gets("/w")[0].headers["If-Range"] == site.etag(BODY)


def test_damage_is_fetched_once_more(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    site.faults["/w"] = [("flip",)]
    assert Transfer(remote(site), tmp_path).shown == len(BODY)
    check(tmp_path)
    assert "arrived damaged (its sha256 is" in capsys.readouterr().err


def test_lasting_damage_is_named_and_leaves_nothing(site: Site, tmp_path: Path) -> None:
    site.faults["/w"] = [("flip",)] * 10
    with pytest.raises(CheckpointError) as raised:
        Transfer(remote(site), tmp_path)
    assert "w (100,000 bytes) could not be fetched" in str(raised.value)
    assert "it arrived damaged, twice: its sha256 is" in str(raised.value)
    assert f"put the file at {tmp_path / 'w'} by hand" in str(raised.value)
    assert not list(tmp_path.iterdir())
    assert len(site.gets("/w")) == 2


def test_a_damaged_part_of_an_earlier_run_is_found_out(site: Site, tmp_path: Path) -> None:
    remote(site).part(tmp_path).write_bytes(b"x" * HALF)
    Transfer(remote(site), tmp_path)
    check(tmp_path)


def test_mirrors_are_asked_in_turn_and_share_the_part(
    site: Site, mirror: Site, tmp_path: Path
) -> None:
    site.faults["/w"] = [("drop", HALF), ("status", 403, {})]
    Transfer(remote(site, mirror), tmp_path)
    check(tmp_path)
    assert [request.range for request in mirror.gets("/w")] == [f"bytes={HALF}-"]


@pytest.mark.parametrize(
    ("there", "why"),
    [(None, "HTTP 404"), (BODY[:-1], "it has 99,999 bytes there and should have 100,000")],
)
def test_a_mirror_without_the_file_is_passed_over(
    site: Site, mirror: Site, tmp_path: Path, there: bytes | None, why: str
) -> None:
    for server in (site, mirror):
        del server.files["/w"]
        if there is not None:
            server.files["/w"] = there
    with pytest.raises(CheckpointError) as raised:
        Transfer(remote(site, mirror), tmp_path)
    for server in (site, mirror):
        assert f"{server.url}/w: {why}" in str(raised.value)
    mirror.files["/w"] = BODY
    Transfer(remote(site, mirror), tmp_path)
    check(tmp_path)


def test_a_server_that_ends_before_its_own_length_is_given_up(site: Site, tmp_path: Path) -> None:
    site.files["/w"] = BODY[:HALF]
    site.headers["/w"] = {"Content-Length": str(len(BODY))}  # a lie
    with pytest.raises(CheckpointError, match="HTTP 416"):
        Transfer(remote(site), tmp_path)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("status", "headers", "wait"),
    [
        (429, {"Retry-After": "7"}, 7),
        (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        (429, {"Retry-After": "86400"}, 600),
        (500, {"Retry-After": "soon"}, None),
        (502, {}, None),
    ],
)
def test_a_busy_server_is_asked_again_when_it_says(
    site: Site, tmp_path: Path, status: int, headers: dict[str, str], wait: float | None
) -> None:
    site.faults["/w"] = [("status", status, headers)]
    (waited,) = Transfer(remote(site), tmp_path).waits
    check(tmp_path)
    assert waited == wait if wait is not None else 1 <= waited <= 2


def test_a_disk_that_takes_no_more_is_fatal_and_named(site: Site, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (HALF, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"\.part cannot be written: File too large"):
            Transfer(remote(site), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(site.gets("/w")) == 1
    Transfer(remote(site), tmp_path)
    check(tmp_path)


def test_the_proxy_of_the_environment_is_used(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", site.url)
    site.files["http://weights.invalid/w"] = BODY
    Transfer(remote(site, urls=("http://weights.invalid/w",)), tmp_path)
    check(tmp_path)


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
        (["own/small", "--mirror", "ftp://x"], "--mirror ftp://x is no URL"),
        (["own/small", "--jobs", "0"], "--jobs 0 is below 1"),
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
