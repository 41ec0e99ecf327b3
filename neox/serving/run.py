"""From a configuration to a server that answers."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from neox import log
from neox.config import NeoXConfig
from neox.errors import ConfigError
from neox.parallel.groups import ProcessGroups
from neox.serving.app import build_app
from neox.serving.engine import Engine
from neox.serving.metrics import Metrics
from neox.serving.replica import Decoder, Replica, follow
from neox.serving.server import KEYS, Server, address, is_loopback, listen, read_keys
from neox.serving.service import Limits, Service
from neox.tokenizer import Tokenizer
from neox.tokenizer.chat import chat_template_beside

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    config: NeoXConfig,
    groups: ProcessGroups,
    tokenizer: Tokenizer,
    load: Callable[[], Decoder],
) -> None:
    """Answer until SIGTERM or SIGINT. `load` makes this rank's decoder once the port is open.

    Collective over the world, on the main thread. Raises ConfigError before anything is loaded when
    the port is in use or the keys cannot be read.
    """
    check_names(config)
    if groups.rank > 0:
        replica = Replica(load(), groups)  # until here a signal ends it, as it does rank 0
        _on_signals(signal.SIG_IGN)  # from here on rank 0 says when it is over
        follow(replica)
        return
    keys = read_keys(config.serve_api_keys_file)
    listener = listen(config.serve_host, config.serve_port)
    url = address(listener, config.serve_host)
    _warn_of_strangers(config, keys)
    service = build_service(config, tokenizer)
    engine = service.engine
    app = build_app(
        service,
        keys,
        config.serve_max_body,
        config.serve_connections,
        config.serve_cors_origins or (),
    )
    server = Server(
        app,
        engine,
        listener,
        config.serve_io_timeout,
        config.serve_connections,
        config.serve_grace,
    )
    with server.running():
        _on_signals(_leave)
        decoder = load()
        if groups.world_size > 1:
            # A signal may have ended other ranks; who waits for them in C++ runs no handler.
            _on_signals(signal.SIG_DFL)
        replica = Replica(decoder, groups)
        engine.open(replica.decoder)
        _on_signals(lambda number, frame: server.stop())
        _announce(url, service, bool(keys))
        engine.run(replica)
    log.info("stopped")


def build_service(config: NeoXConfig, tokenizer: Tokenizer) -> Service:
    """What the endpoints work with. Raises ConfigError for a chat template that is none."""
    capacity = config.serve_rows + config.serve_queue
    engine = Engine(capacity, config.serve_request_timeout, Metrics())
    context = max_length(config)
    return Service(
        engine=engine,
        tokenizer=tokenizer,
        template=chat_template_beside(config),
        name=model_name(config),
        adapters=tuple(config.adapters or ()),
        limits=Limits(
            context=context,
            prompt=min(context - 1, config.serve_max_prompt_tokens or context),
            answer=config.serve_max_tokens or context,
            complete=config.maximum_tokens,
        ),
        created=int(time.time()),
        legacy_double_json=config.legacy_double_json,
    )


def max_length(config: NeoXConfig) -> int:
    """Tokens that a row must have room for: the two limits together, and never the model's own."""
    prompt, answer = config.serve_max_prompt_tokens, config.serve_max_tokens
    if prompt is None or answer is None:
        return config.seq_length
    return min(config.seq_length, prompt + answer)


def model_name(config: NeoXConfig) -> str:
    """That of the first configuration file: 20B of configs/20B.yml."""
    return Path(next(iter(config.config_files or ()), "model")).stem


def check_names(config: NeoXConfig) -> None:
    """Raises ConfigError for an adapter that has the model's own name."""
    name = model_name(config)
    if name in (config.adapters or {}):
        raise ConfigError(
            f"adapters.{name}: {name} is the name of the model itself, after its first "
            "configuration file. Give the adapter another"
        )


def _warn_of_strangers(config: NeoXConfig, keys: list[str]) -> None:
    if not keys and not is_loopback(config.serve_host):
        log.warning(
            f"serve_host {config.serve_host} can be reached from other machines, and there are no "
            f"API keys: whoever reaches it may use it. Set {KEYS} or serve_api_keys_file"
        )


def _announce(url: str, service: Service, keyed: bool) -> None:
    key = " -H 'Authorization: Bearer KEY'" if keyed else ""
    log.info(
        f"serving {', '.join(service.models)} at {url}\n"
        f"  curl {url}/v1/completions -H 'Content-Type: application/json'{key} "
        '-d \'{"prompt": "It was", "max_tokens": 16}\''
    )


def _on_signals(handler: Callable[[int, FrameType | None], object] | signal.Handlers) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(0)  # nothing has begun
