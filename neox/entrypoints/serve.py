"""`./deepy.py serve.py`: a checkpoint behind HTTP."""

from __future__ import annotations

from neox.config import NeoXConfig
from neox.inference.decoder import Decoder
from neox.inference.load import load_model
from neox.parallel.groups import ProcessGroups
from neox.serving.run import max_length, serve
from neox.tokenizer import build_tokenizer


def main(config: NeoXConfig, groups: ProcessGroups) -> None:
    """Serve until a signal ends it. Collective over the world."""
    tokenizer = build_tokenizer(config)

    def load() -> Decoder:
        model = load_model(config, groups, tokens=tokenizer.vocab_size)
        return Decoder(model, tokenizer, config.serve_rows, max_length(config))

    serve(config, groups, tokenizer, load)
