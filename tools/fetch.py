#!/usr/bin/env python3
"""Download public weights and corpora as they are published: GPT-NeoX-20B, Pythia, GPT-J, enwik8.

    python tools/fetch.py 20B                             # the slim weights, in NeoX's layer files
    python tools/fetch.py pythia-1.4b --revision step1000
    python tools/fetch.py gpt-j-6B
    python tools/fetch.py OWNER/REPO --output DIR         # any model of the Hugging Face hub
    python tools/fetch.py enwik8                          # a corpus of tools/corpora.yml, to data/

What was interrupted goes on where it stopped, and what is finished is not fetched again. Every file
is compared with the size and the checksum that its source publishes. HF_TOKEN, HF_ENDPOINT and the
proxies of the environment are respected. tools/prepare_data.py fetches a corpus and tokenizes it.

This is not done by huggingface_hub, because that library loses the part of a file that an ended
process had fetched and compares no checksums, and 20B's slim weights are not on the hub.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox import log
from neox.atomic import write_text
from neox.checkpoint.manifest import Entry, Manifest, digest
from neox.errors import CheckpointError, NeoXError
from tools.corpora import Corpus, list_corpus, read_corpora, with_url
from tools.download import Client, RemoteFile, in_parallel
from tools.published import HUB, SLIM_20B, STEP_20B, Listing, list_20b, list_hub

REPOSITORY = Path(__file__).resolve().parents[1]
RECORD = "fetched.json"


def main(
    arguments: Sequence[str] | None = None, wait: Callable[[float], object] | None = None
) -> int:
    """`wait` sleeps between attempts."""
    options = parse(arguments)
    hub = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    client = Client(wait, os.environ.get("HF_TOKEN"), f"{hub}/")
    try:
        corpus = named_corpus(options.model, read_corpora(options.corpora), options.url)
        fill_in(options, corpus)
        listing = list_files(client, options, corpus, hub)
        if options.dry_run:
            for file in listing.files:
                print(f"{size(file.bytes):>9}  {file.path}")
            print(
                f"{size(total(listing.files)):>9}  {len(listing.files)} files, to {options.output}"
            )
            return 0
        record = Record(options.output)
        fetch(client, listing, record, options.jobs)
        if options.model == "20B":
            finish_20b(options.output, record)
    except (NeoXError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        client.stop.set()
    say(listing, options.output)
    return 0


def list_files(
    client: Client, options: argparse.Namespace, corpus: Corpus | None, hub: str
) -> Listing:
    if corpus:
        output, jobs = options.output, options.jobs
        return list_corpus(client, corpus, options.mirror, output, jobs, force=False)
    if options.model == "20B":
        return list_20b(client, [*options.mirror, *SLIM_20B], options.jobs)
    return list_hub(client, [*options.mirror, hub], options.model, options.revision)


def say(listing: Listing, output: Path) -> None:
    files, bytes_ = len(listing.files), size(total(listing.files))
    log.info(f"{output}: {files} files, {bytes_}; {listing.checks}")


def named_corpus(name: str, corpora: dict[str, Corpus], url: str | None) -> Corpus | None:
    """The corpus of that name, if it is one; with `url`, it is one by being there."""
    return with_url(corpora.get(name), name, url) if url else corpora.get(name)


def fetch_corpus(
    client: Client, corpus: Corpus, output: Path, options: argparse.Namespace, force: bool
) -> None:
    """Bring what is not there yet. Raises DataError, CheckpointError."""
    listing = list_corpus(client, corpus, options.mirror, output, options.jobs, force)
    if force:
        for file in listing.files:
            (output / file.path).unlink(missing_ok=True)
    fetch(client, listing, Record(output), options.jobs)
    say(listing, output)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.rpartition("\n\n")[0],  # why this way is not for users
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model",
        metavar="NAME",
        help="20B, a name like pythia-1.4b-deduped or gpt-j-6B, OWNER/REPO on the hub, or a corpus",
    )
    parser.add_argument(
        "--revision", help="branch, tag or commit on the hub; default: main, of gpt-j-6B float16"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: 20B_checkpoints, checkpoints/MODEL, or data/CORPUS",
    )
    add_addresses(parser)
    parser.add_argument("--dry_run", action="store_true", help="list the files and fetch none")
    options = parser.parse_args(arguments)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", options.model):
        parser.error(f"{options.model} is neither a model's name nor OWNER/REPO")
    if options.model == "20B" and options.revision:
        parser.error("the slim weights of 20B have no revisions; EleutherAI/gpt-neox-20b has")
    return options


def add_addresses(parser: argparse.ArgumentParser) -> None:
    """Flags that say where from, of this command and of tools/prepare_data.py."""
    parser.add_argument(
        "--mirror",
        type=address,
        action="append",
        default=[],
        metavar="URL",
        help="ask this server first: a folder with the files of 20B or of a corpus, otherwise a "
        "hub; may be given repeatedly",
    )
    parser.add_argument(
        "--url", help="address of a corpus instead of the table's; {shard} numbers several files"
    )
    parser.add_argument(
        "--corpora",
        type=Path,
        metavar="YAML",
        help="a table as tools/corpora.yml, of more or other corpora; default: NEOX_CORPORA",
    )
    parser.add_argument(
        "--jobs", type=positive, default=4, help="files at a time; default: %(default)s"
    )


def address(text: str) -> str:
    if not re.match(r"https?://.", text):
        raise argparse.ArgumentTypeError(f"{text} is no URL that begins with http:// or https://")
    return text.rstrip("/")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return int(text)


def fill_in(options: argparse.Namespace, corpus: Corpus | None) -> None:
    """The defaults that depend on what is fetched."""
    if corpus:
        options.output = options.output or Path("data") / corpus.folder
        return
    if options.model == "20B":
        options.output = options.output or Path("20B_checkpoints")  # as configs/20B.yml has it
        return
    if "/" not in options.model:
        options.model = f"EleutherAI/{options.model}"
    name = options.model.partition("/")[2]
    if options.output is None:
        folder = f"{name}-{options.revision}" if options.revision else name
        options.output = Path("checkpoints") / folder.replace("/", "-")
    # GPT-J's main branch is the same numbers in fp32, twice the bytes.
    options.revision = options.revision or ("float16" if name.lower() == "gpt-j-6b" else "main")


def fetch(client: Client, listing: Listing, record: Record, jobs: int) -> None:
    """Bring every file into the record's folder; what is there is kept. Raises CheckpointError."""
    output = record.output
    missing = [file for file in listing.files if not record.holds(file)]
    check_space(missing, output)
    begun = sum(part.stat().st_size for file in missing if (part := file.part(output)).exists())
    lock = threading.Lock()
    with (
        alone_in(output),
        log.progress(total=total(missing), desc="fetching", unit="B", initial=begun) as bar,
    ):

        def report(count: int) -> None:
            with lock:
                bar.update(count)

        def bring(file: RemoteFile) -> Entry:
            target = output / file.path
            try:  # a file that was put there by hand
                file.verify(target)
                report(file.bytes)
            except (FileNotFoundError, CheckpointError) as reason:
                if target.exists():
                    log.warning(f"{target} is not what is published, {reason}: fetching it anew")
                client.fetch(file, output, report)
            return digest(target)

        for file, entry in in_parallel(bring, missing, jobs):
            record.add(file, entry)


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Two fetches would write to the same parts. The lock ends with its process."""
    output.mkdir(parents=True, exist_ok=True)
    handle = os.open(output, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{output}: another fetch is at work there.") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Finished:
    """A file in place: its size and checksum, when it was written, what its source published."""

    bytes: int
    xxh128: str
    modified_ns: int
    published: str | None


class Record:
    """fetched.json: the files in place, so that a later run need not read them again."""

    def __init__(self, output: Path) -> None:
        self.output = output
        try:
            lines = json.loads((output / RECORD).read_text(encoding="utf-8"))
            self.files = {path: Finished(**line) for path, line in lines.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            self.files = {}

    def holds(self, file: RemoteFile) -> bool:
        """Whether this version of the file was verified and nothing has touched it since."""
        path, finished = self.output / file.path, self.files.get(file.path)
        if finished is None or not path.exists():
            return False
        found = (path.stat().st_size, path.stat().st_mtime_ns)
        return (
            found == (finished.bytes, finished.modified_ns)
            and finished.published == (file.digest or file.version)
            and finished.bytes == file.bytes
        )

    def add(self, file: RemoteFile, entry: Entry) -> None:
        modified = (self.output / file.path).stat().st_mtime_ns
        published = file.digest or file.version
        self.files[file.path] = Finished(entry.bytes, entry.xxh128, modified, published)
        lines = {path: asdict(finished) for path, finished in sorted(self.files.items())}
        write_text(self.output / RECORD, json.dumps(lines, indent=1) + "\n")


def check_space(missing: Sequence[RemoteFile], output: Path) -> None:
    """Raises CheckpointError when the disk has too little room for what is yet to come."""
    needed = 0
    for file in missing:
        part = file.part(output)
        have = output / file.path if (output / file.path).exists() else part
        needed += file.bytes - (have.stat().st_size if have.exists() else 0)
    existing = next(folder for folder in [output, *output.absolute().parents] if folder.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise CheckpointError(
            f"{output}: {size(needed)} are yet to come and {size(free)} are free on its disk. Make "
            "room, or name a folder on another disk with --output."
        )


def finish_20b(output: Path, record: Record) -> None:
    """Write what makes the folder a checkpoint: the manifest, then `latest`."""
    from neox.config import from_dict, source
    from neox.config.architecture import ARCHITECTURE, architecture

    values = source.read(REPOSITORY / "configs/20B.yml").values
    config = from_dict({key: values[key] for key in values if key in (*ARCHITECTURE, "seq_length")})
    files = {}
    for path in sorted((output / STEP_20B).glob("*.pt")):  # what else was put there belongs to it
        finished = record.files.get(f"{STEP_20B}/{path.name}")
        files[path.name] = Entry(finished.bytes, finished.xxh128) if finished else digest(path)
    Manifest(
        output / STEP_20B,
        iteration=int(STEP_20B.removeprefix("global_step")),
        grid={"tp": 2, "pp": 4, "dp": 12},
        padded_vocab_size=50432,
        architecture=architecture(config),
        files=files,
    ).write()
    write_text(output / "latest", STEP_20B)


def total(files: Sequence[RemoteFile]) -> int:
    return sum(file.bytes for file in files)


def size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


if __name__ == "__main__":
    sys.exit(main())
