#!/usr/bin/env python3
"""Fetch a corpus by its name and tokenize it, in one step.

    python tools/prepare_data.py enwik8 -t CharLevelTokenizer -d data
    python tools/prepare_data.py pile_subset -t HFTokenizer -v 20B_tokenizer.json

writes data/NAME/NAME_text_document.bin and .idx, which data_path in a configuration names without
the ending. What was fetched before is not fetched again; a file that was put into data/NAME by hand
is taken. Without -v and -m, GPT2BPETokenizer's files are fetched into the data folder too.

tools/corpora.yml has the names and addresses; docs/preprocessing.md tells how to use others.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neox import log
from neox.data.preprocess import preprocess
from neox.data.recipes import TextRecipe
from neox.errors import DataError, NeoXError
from neox.tokenizer import TYPES, load_tokenizer
from tools.corpora import Corpus, read_corpora
from tools.download import Client
from tools.fetch import add_addresses, fetch_corpus, named_corpus


def main(
    arguments: Sequence[str] | None = None, wait: Callable[[float], object] | None = None
) -> int:
    """`wait` sleeps between attempts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", nargs="?", default="enwik8", help="default: %(default)s")
    parser.add_argument("-t", "--tokenizer", default="GPT2BPETokenizer", choices=TYPES)
    parser.add_argument(
        "-d",
        "--data-dir",
        type=Path,
        default=Path(os.environ.get("DATA_DIR", "data")),
        help="default: the environment's DATA_DIR, or data",
    )
    parser.add_argument("-v", "--vocab-file")
    parser.add_argument("-m", "--merge-file")
    parser.add_argument(
        "-f", "--force-redownload", action="store_true", help="fetch what is there already, too"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="tokenizing processes; default: %(default)s",
    )
    add_addresses(parser)
    options = parser.parse_args(arguments)
    client = Client(wait)
    try:
        corpora = read_corpora(options.corpora)
        corpus = named_corpus(options.dataset.lower(), corpora, options.url)
        if corpus is None:
            raise DataError(f"{options.dataset} is none of {', '.join(corpora)}; give its --url")
        folder = options.data_dir / corpus.folder
        fetch_corpus(client, corpus, folder, options, options.force_redownload)
        vocab_file, merge_file = tokenizer_files(client, corpora, options)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        tokenizer = load_tokenizer(options.tokenizer, vocab_file, merge_file)
        prefix = folder / corpus.folder
        done = preprocess(
            [folder / name for name in corpus.files()],
            prefix,
            TextRecipe(tokenizer, append_eod=True),
            workers=options.workers if corpus.documents != 1 else 1,
            num_docs=corpus.documents,
        )
    except (NeoXError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    finally:
        client.stop.set()
    log.info(f"{done.documents} documents, {done.tokens} tokens in {done.seconds:.1f} s")
    log.info(f"wrote {prefix}_text_document.bin and .idx")
    return 0


def tokenizer_files(
    client: Client, corpora: dict[str, Corpus], options: argparse.Namespace
) -> tuple[str | None, str | None]:
    """The files that are named, or GPT-2's, which are fetched where they are needed."""
    files = [options.vocab_file, options.merge_file]
    if options.tokenizer == "GPT2BPETokenizer" and None in files:
        if files != [None, None]:
            raise DataError("GPT2BPETokenizer needs both -v and -m, or neither for GPT-2's own")
        for i, name in enumerate(("gpt2-vocab", "gpt2-merges")):
            fetch_corpus(client, corpora[name], options.data_dir, options, force=False)
            files[i] = str(options.data_dir / next(iter(corpora[name].files())))
    return files[0], files[1]


if __name__ == "__main__":
    sys.exit(main())
