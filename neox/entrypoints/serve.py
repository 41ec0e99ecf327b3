"""`./deepy.py serve.py`: a checkpoint behind HTTP."""

from __future__ import annotations

from neox.config import NeoXConfig
from neox.inference.decoder import Decoder
from neox.inference.load import prepare
from neox.parallel.groups import ProcessGroups
from neox.serving.run import max_length, serve
from neox.tokenizer import build_tokenizer


def main(config: NeoXConfig, groups: ProcessGroups) -> None:
    """Serve until a signal ends it. Collective over the world."""
    tokenizer = build_tokenizer(config)

    prepared = prepare(config, groups, tokens=tokenizer.vocab_size, named=config.adapters)

    def load() -> Decoder:
        return Decoder(prepared.load(), tokenizer, config.serve_rows, max_length(config))

    serve(config, groups, tokenizer, load)
