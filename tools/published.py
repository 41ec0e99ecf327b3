"""What the sources of public weights publish: files, sizes, checksums."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from neox.errors import CheckpointError
from tools.download import Client, RemoteFile, Unavailable, in_parallel

HUB = "https://huggingface.co"
SLIM_20B = tuple(
    f"https://{host}/public/AI/models/GPT-NeoX-20B/slim_weights"
    for host in ("the-eye.eu", "mystic.the-eye.eu")
)
STEP_20B = "global_step150000"
FILES_20B = [
    "20B_tokenizer.json",
    *(
        f"{STEP_20B}/layer_{layer:02d}-model_{shard:02d}-model_states.pt"
        for layer in (0, *range(2, 46), 47, 48)  # 1 and 46 have no parameters
        for shard in (0, 1)
    ),
]

# Of a transformers folder: what the use of the model takes, and the first kind of weights there is.
_KEPT = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)"
    r"\.json|merges\.txt"
)
_WEIGHTS = (
    r"model\.safetensors",
    r"model-\d+-of-\d+\.safetensors|model\.safetensors\.index\.json",
    r"pytorch_model\.bin",
    r"pytorch_model-\d+-of-\d+\.bin|pytorch_model\.bin\.index\.json",
)


@dataclass(frozen=True)
class Listing:
    """The files to be fetched; `checks` says what will have been compared once they are here."""

    files: list[RemoteFile]
    checks: str


def list_20b(client: Client, servers: Sequence[str], jobs: int) -> Listing:
    """The slim weights, with sizes, and checksums where a server has a SHA256SUMS.

    Raises CheckpointError when no server answers, or none has one of the files.
    """
    sums: dict[str, str] = {}
    answering, problems = [], []
    for server in servers:
        try:
            sums = read_sums(client, server) | sums
            answering.append(server)
        except Unavailable as error:
            problems.append(f"  {server}: {error}")
    if not answering:
        raise CheckpointError("no server of the 20B weights answers:\n" + advice(problems))

    def find(path: str) -> RemoteFile:
        urls = tuple(f"{server}/{path}" for server in answering)
        problems = []
        for url in urls:
            try:
                headers = client.head(url)
                length = int(headers.get("Content-Length", ""))
            except Unavailable as error:
                problems.append(f"  {url}: {error}")
            except ValueError:
                problems.append(f"  {url}: the server does not say how large it is")
            else:
                if path in sums:
                    return RemoteFile(path, urls, length, f"sha256:{sums[path]}")
                etag = headers.get("ETag", "W/")  # a weak one may stand for differing bytes
                version = headers.get("Last-Modified") if etag.startswith("W/") else etag
                return RemoteFile(path, urls, length, version=version)
        raise CheckpointError(f"{path} is on no server:\n" + advice(problems))

    files = dict(in_parallel(find, FILES_20B, jobs))
    checks = "sizes and the server's SHA256SUMS are right"
    if set(files) - set(sums):
        checks = "sizes and the checksums inside the layer files are right; no others are published"
    return Listing([files[path] for path in FILES_20B], checks)


def read_sums(client: Client, server: str) -> dict[str, str]:
    """SHA-256 by path, of a server's SHA256SUMS if it has one. Raises Unavailable: no answer."""
    sums = {}
    for folder in ("", f"{STEP_20B}/"):
        try:
            body, _ = client.read(f"{server}/{folder}SHA256SUMS")
        except Unavailable as error:
            if error.status is None:
                raise
            continue
        for line in body.decode(errors="replace").splitlines():
            if match := re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", line.strip()):
                sums[folder + match[2]] = match[1]
    return sums


def list_hub(client: Client, hubs: Sequence[str], repository: str, revision: str) -> Listing:
    """The files of a model that its use takes, with the sizes and checksums of the hub's listing.

    Raises CheckpointError when no hub has the model, or it has no weights.
    """
    problems = []
    for hub in hubs:
        try:
            entries = read_tree(client, hub, repository, revision)
            break
        except Unavailable as error:
            problems.append(f"  {hub}: {error}")
    else:
        raise CheckpointError(
            f"{repository} at revision {revision} cannot be listed:\n"
            + advice(problems)
            + " A private or gated model needs HF_TOKEN."
        )
    by_name = {entry["path"]: entry for entry in entries}
    kinds = [[name for name in by_name if re.fullmatch(kind, name)] for kind in _WEIGHTS]
    weights = next(filter(None, kinds), None)
    if not weights:
        raise CheckpointError(
            f"{repository} at revision {revision} has no weights that are read here: neither "
            f"model*.safetensors nor pytorch_model*.bin. It has {', '.join(sorted(by_name))}."
        )
    files = []
    for name in sorted([*filter(_KEPT.fullmatch, by_name), *weights]):
        lfs = by_name[name].get("lfs")
        digest = f"sha256:{lfs['oid']}" if lfs else f"git-sha1:{by_name[name]['oid']}"
        urls = tuple(f"{hub}/{repository}/resolve/{quote(revision, '')}/{name}" for hub in hubs)
        files.append(RemoteFile(name, urls, by_name[name]["size"], digest))
    return Listing(files, "sizes and checksums are the hub's")


def read_tree(client: Client, hub: str, repository: str, revision: str) -> list[dict[str, Any]]:
    """The entries of a repository's top folder. Raises Unavailable."""
    url: str | None = f"{hub}/api/models/{repository}/tree/{quote(revision, '')}"
    entries: list[dict[str, Any]] = []
    while url:
        body, headers = client.read(url)
        try:
            page = json.loads(body)
            for entry in page:  # what list_hub reads
                _ = entry["path"], entry["size"], entry["oid"]
        except (ValueError, TypeError, KeyError) as error:
            raise Unavailable("its answer is not a list of files") from error
        entries += page
        following = re.search(r'<([^>]+)>;\s*rel="next"', headers.get("Link", ""))
        url = following[1] if following else None
    return entries


def advice(problems: Sequence[str]) -> str:
    return (
        "\n".join(problems)
        + "\nCheck the name, the network and its proxies, or name another server with --mirror."
    )
