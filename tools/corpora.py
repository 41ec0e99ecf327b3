"""Corpora by name: the table of their addresses, and what is yet to be fetched of one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from neox import log
from neox.errors import CheckpointError, DataError
from tools.download import Client, RemoteFile, Unavailable, in_parallel
from tools.published import Listing

TABLE = Path(__file__).with_name("corpora.yml")
_KEYS = {"urls", "shards", "folder", "documents", "sha256"}


@dataclass(frozen=True)
class Corpus:
    """One entry of the table; its comment says what is what."""

    name: str
    urls: tuple[str, ...]
    shards: int | None = None
    folder: str = ""
    documents: int | None = None
    sha256: str | None = None

    def files(self, mirrors: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
        """Addresses by file name; `mirrors` are folders with the same files, asked first."""
        found = {}
        for shard in range(self.shards or 1):
            urls = [url.format(shard=shard) for url in self.urls]
            name = urls[0].partition("?")[0].rpartition("/")[2]
            found[name] = (*(f"{mirror}/{name}" for mirror in mirrors), *urls)
        return found


def read_corpora(extra: Path | None = None) -> dict[str, Corpus]:
    """The table, with the entries of `extra`, or else of the file that NEOX_CORPORA names.

    DataError where one of them is not in the form of the table.
    """
    if extra is None and os.environ.get("NEOX_CORPORA"):
        extra = Path(os.environ["NEOX_CORPORA"])
    corpora: dict[str, Corpus] = {}
    for path in filter(None, (TABLE, extra)):
        try:
            entries = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise DataError(f"the table of corpora {path} cannot be read: {error}") from None
        if not isinstance(entries, dict):
            raise DataError(f"{path} is no table of corpora: names with urls are needed")
        for name, entry in entries.items():
            corpora[name] = _corpus(f"{path}: {name}", str(name), entry)
    return corpora


def _corpus(where: str, name: str, entry: Any) -> Corpus:
    if not isinstance(entry, dict) or not entry.keys() <= _KEYS or not entry.get("urls"):
        raise DataError(f"{where}: urls is needed; there may be {', '.join(sorted(_KEYS))}")
    for key in ("shards", "documents"):
        if not isinstance(entry.get(key, 1), int) or entry.get(key, 1) < 1:
            raise DataError(f"{where}: {key} is {entry[key]!r}, a number from 1 on is needed")
    sha256 = entry.get("sha256")
    if sha256 is not None and ("shards" in entry or not re.fullmatch(r"[0-9a-f]{64}", str(sha256))):
        raise DataError(f"{where}: sha256 is 64 of 0-9a-f, and only of a corpus without shards")
    urls = entry["urls"]
    if not isinstance(urls, str | list):
        raise DataError(f"{where}: urls is {urls!r}, an address or a list of them is needed")
    urls = tuple(map(str, [urls] if isinstance(urls, str) else urls))
    folder = str(entry.get("folder", name))
    return _checked(where, Corpus(name, **(entry | {"urls": urls, "folder": folder})))


def _checked(where: str, corpus: Corpus) -> Corpus:
    """The corpus. DataError: its addresses are none, or do not tell its shards apart."""
    for url in corpus.urls:
        if not re.match(r"https?://[^/]+/.*[^/]$", url):
            raise DataError(f"{where}: {url!r} is not the address of a file (http:// or https://)")
        try:
            names = replace(corpus, urls=(url,)).files()
        except (ValueError, LookupError, AttributeError) as error:
            raise DataError(f"{where}: {url} has braces other than {{shard}} ({error})") from None
        if len(names) < (corpus.shards or 1):
            raise DataError(
                f"{where}: {url} names {len(names)} files, and there are {corpus.shards} shards; "
                "the file's name needs {shard}"
            )
    return corpus


def with_url(corpus: Corpus | None, name: str, url: str) -> Corpus:
    """The corpus at another address; what else the table says of it still holds."""
    if "/" in name or name == "20B":
        raise DataError(f"--url is the address of a corpus, and {name} is a model; see --mirror")
    corpus = corpus or Corpus(name, (), folder=name)
    return _checked("--url", replace(corpus, urls=(url,)))


def list_corpus(
    client: Client, corpus: Corpus, mirrors: Sequence[str], output: Path, jobs: int, force: bool
) -> Listing:
    """What is to be fetched, with sizes; a file in place is taken as it stands unless `force`.

    One whose checksum is known and another is fetched anew. DataError: no server has a file.
    """
    digest = f"sha256:{corpus.sha256}" if corpus.sha256 else None

    def find(item: tuple[str, tuple[str, ...]]) -> RemoteFile | None:
        name, urls = item
        target = output / name
        if target.exists() and not force:
            try:
                RemoteFile(name, urls, target.stat().st_size, digest).verify(target)
                return None
            except CheckpointError as reason:
                log.warning(f"{target} is not what is published, {reason}: fetching it anew")
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
                etag = headers.get("ETag", "W/")  # a weak one may stand for differing bytes
                version = headers.get("Last-Modified") if etag.startswith("W/") else etag
                return RemoteFile(name, urls, length, digest, version)
        raise DataError(
            f"{corpus.name}: {name} is on no server:\n"
            + "\n".join(problems)
            + f"\nPut the file at {target} by hand, or name another address with --url, with "
            "--mirror, or in a table of your own (--corpora)."
        )

    items = list(corpus.files(mirrors).items())
    found = dict(in_parallel(find, items, jobs))
    files = [file for item in items if (file := found[item]) is not None]
    if digest:
        checks = "the checksum is right"
    else:
        checks = "the sizes are right, and no checksums are published"
    if kept := len(items) - len(files):
        checks = f"{kept} in place before; {checks}" if files else f"{kept} in place before"
    return Listing(files, checks)
