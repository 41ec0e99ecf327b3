"""uvicorn in a thread of its own, beside the thread that decodes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import math
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from neox.errors import ConfigError
from neox.serving.engine import Engine
from neox.serving.errors import Unavailable
from neox.serving.protocol import PatientProtocol

KEYS = "NEOX_API_KEYS"
# Once requests that outlive their grace are told so, for the answers to be sent.
_LAST_ANSWERS_S = 2


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on. Raises ConfigError: the port is in use, say."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        where = f"serve_host {host}, serve_port {port}"
        unknown = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        advice = "name another with --set serve_port=PORT"
        if unknown:
            advice = "name an address of this machine, or 0.0.0.0 for all of them"
        # create_server adds to strerror what is said here already.
        reason = error.strerror if unknown else os.strerror(error.errno or 0)
        raise ConfigError(f"{where}: cannot listen there: {reason}; {advice}") from error


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def address(listener: socket.socket, host: str) -> str:
    """The URL that a browser on this machine takes."""
    port = listener.getsockname()[1]
    if host in ("0.0.0.0", "::"):
        host = "localhost"
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def read_keys(file: str | None) -> list[str]:
    """The API keys: those of the file, one a line, and of the environment, commas between them.

    Raises ConfigError for a file that cannot be read or has none.
    """
    keys = [key.strip() for key in os.environ.get(KEYS, "").split(",")]
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"serve_api_keys_file {file} cannot be read: {error}") from error
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigError(f"serve_api_keys_file {file} has no keys: write one a line")
        keys += found
    return [key for key in keys if key]


def _is_bug(record: logging.LogRecord) -> bool:
    """Tracebacks of ours are for the console; what uvicorn says of clients is not."""
    return record.exc_info is not None


class Server:
    """Answers on a thread of its own, from `running` to its end."""

    def __init__(
        self,
        app: ASGIApp,
        engine: Engine,
        listener: socket.socket,
        io_timeout: float,
        connections: int,
        grace: float,
    ) -> None:
        """Times in seconds; they are the configuration's."""
        protocol = type(
            "Protocol",
            (PatientProtocol,),
            {"seconds": io_timeout, "most_idle": connections, "idle": {}},
        )
        logging.getLogger("uvicorn.error").addFilter(_is_bug)
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that have gone
        self._engine = engine
        self._listener = listener
        self._grace = grace
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                loop="asyncio",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=math.ceil(grace) + _LAST_ANSWERS_S,
            )
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._up = threading.Event()
        self._error: BaseException | None = None

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Answer while the block runs. It ends once every answer is given, or by an exception.

        Raises what keeps the thread from answering: where it cannot begin, instead of the block.
        """
        thread = threading.Thread(target=self._run, name="server", daemon=True)
        thread.start()
        self._up.wait()
        try:
            if self._error is not None:
                raise self._error
            yield
        finally:
            self.stop()
            thread.join()
            self._listener.close()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Take no more connections; `Engine.stop` follows once running requests have their answers.

        They have the grace; after a second call, none. For signal handlers too.
        """
        again = self._engine.state in ("stopping", "failed")
        if self._engine.state != "failed":
            self._engine.state = "stopping"
        self._uvicorn.should_exit = True
        if self._loop is None:  # it has never begun, and `running` raises why
            return
        grace = 0.0 if again else self._grace
        with contextlib.suppress(RuntimeError):  # its end came first
            self._loop.call_soon_threadsafe(
                self._loop.call_later, grace, self._engine.fail_all, Unavailable("stopping")
            )

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._up.set()
            self._engine.stop()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._engine.attach()
        self._up.set()
        await self._uvicorn.serve(sockets=[self._listener])
