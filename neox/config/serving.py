"""Serving."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from neox.config.fields import key


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """What serve.py answers, to whom, and how much of it."""

    serve_host: str = key("127.0.0.1", "Address to listen on; by default only this machine's own.")
    serve_port: int = key(8000, "Port to listen on; 0 is any that is free.", low=0, high=65535)
    serve_rows: int = key(8, "Sequences that are decoded together.", low=1)
    serve_queue: int = key(64, "Sequences that may wait for a row.", low=0)
    serve_max_prompt_tokens: int | None = key(
        None, "Tokens a prompt may have; by default what seq_length leaves.", low=1
    )
    serve_max_tokens: int | None = key(
        None, "Tokens a request may ask for; by default what seq_length leaves.", low=1
    )
    serve_max_body: int = key(1 << 20, "Bytes a request's body may have.", low=1)
    serve_request_timeout: float = key(
        600.0, "Seconds a request may wait and be answered in.", above=0
    )
    serve_io_timeout: float = key(
        20.0,
        "Seconds a client may take to send a whole request, or to read what is ready for it.",
        above=0,
    )
    serve_connections: int = key(256, "Requests, and as many idle connections, at a time.", low=1)
    serve_grace: float = key(
        30.0, "Seconds that running requests have left once the server is to stop.", low=0
    )
    serve_api_keys_file: str | None = key(
        None, "File of the API keys, one a line; NEOX_API_KEYS in the environment adds to them."
    )
    serve_cors_origins: list[str] | None = key(
        None, "Origins whose pages may call the server from a browser; none by default."
    )
    legacy_double_json: bool = key(
        False, "POST /prompt/ answers with a JSON string that holds JSON, as it once did."
    )
    adapters: dict[str, Any] | None = key(
        None, "Folders of LoRA adapters by the model name that asks for them."
    )
