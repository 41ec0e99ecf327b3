"""tools/download.py against a server that drops, truncates, damages and refuses."""

from __future__ import annotations

import hashlib
import re
import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from neox.errors import CheckpointError
from tests.tools.server import BODY, HALF, Site
from tools.download import ATTEMPTS, Client, RemoteFile, Unavailable


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


@pytest.mark.parametrize(
    ("number", "waited", "said"),
    [
        (socket.EAI_NONAME, 0, r"x: Name or service not known$"),
        (socket.EAI_AGAIN, 1, r"Temporary failure in name resolution \(2 attempts\)"),
    ],
)
def test_without_a_network_the_wait_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, waited: int, said: str
) -> None:
    def unknown(*arguments: object, **options: object) -> None:
        text = {socket.EAI_NONAME: "Name or service not known"}
        raise socket.gaierror(number, text.get(number, "Temporary failure in name resolution"))

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    waits: list[float] = []
    with pytest.raises(Unavailable) as caught:
        Client(waits.append).head("http://corpora.test/x")
    assert len(waits) == waited
    assert re.search(said, f"x: {caught.value}")


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
