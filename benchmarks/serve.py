"""A server under load: ours against llama.cpp's and transformers', with one model.

32 clients at a time ask /v1/completions of each server for streamed greedy completions of texts of
16 to 256 tokens, 16 to 64 new tokens, each client the next as soon as it has the last. The servers
take turns, each with the same requests in a round; the others wait idle. Latency is from a request
to its end, the first token's from a request to its first text; tokens/s are all new tokens over the
time until the last answer. tokens_per_s_over_PEER and p95_latency_over_PEER are medians over the
rounds of one turn against the other.

Afterwards ours is asked once more for what it answered in the last round, one request at a time:
answers_as_alone is the share of the answers under load that are the same.

    python benchmarks/serve.py [--quick] [--json FILE] [--precision fp32|int8|int4]

transformers takes part in fp32. llama-server is looked for in .venv/bin and on the PATH.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import peer_models  # noqa: E402
from benchmarks.clients import TIMEOUT, Request, Turn, ask  # noqa: E402
from benchmarks.contestants import THREADS  # noqa: E402
from benchmarks.peer_models import SHAPE_160M, TINY, Shape  # noqa: E402
from neox import log  # noqa: E402
from neox.atomic import write_text  # noqa: E402

CLIENTS = 32
PROMPT, NEW = (16, 256), (16, 64)  # tokens, from and to
CONTEXT = 512  # tokens that a server has room for, of each client
START = 300.0  # seconds that a server may take to load


@dataclass(frozen=True)
class Load:
    """How often the servers are asked."""

    shape: Shape
    requests: int  # of each client in a round
    rounds: int


FULL = Load(SHAPE_160M, requests=2, rounds=5)
QUICK = Load(TINY, requests=1, rounds=2)


@dataclass(frozen=True)
class Server:
    """A command that serves on `port`, and the name of its model, None where it has but one."""

    command: list[str]
    model: str | None
    port: int

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def servers(shape: Shape, folder: Path, precision: str) -> dict[str, Server]:
    """Those that are installed; a line about each that is not."""
    port, *ports = free_ports(3)
    found = {"ours": ours(shape, folder, precision, port)}
    if program := llama_server():
        model = str(peer_models.gguf_of(folder, precision))
        found["llama.cpp"] = llama_cpp(program, model, ports[0])
    else:
        print(
            "llama.cpp is left out: there is no llama-server; requirements/requirements-peers.txt "
            "tells how to build it"
        )
    if precision == "fp32":
        model = str(peer_models.transformers_of(folder))
        found["transformers"] = transformers(model, ports[1])
    return found


def llama_server() -> str | None:
    """llama.cpp's own server, where it has been built; llama-cpp-python's has but one row."""
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    return shutil.which("llama-server", path=os.pathsep.join(folders))


def ours(shape: Shape, folder: Path, precision: str, port: int) -> Server:
    values = peer_models.values(shape, folder) | {
        "serve_port": port,
        "serve_rows": CLIENTS,
        "serve_queue": CLIENTS,
        "serve_request_timeout": TIMEOUT,
    }
    if precision != "fp32":
        values |= {"quantize": precision}
    config = folder / "serve.yml"
    config.write_text(json.dumps(values))  # JSON is YAML
    command = [sys.executable, str(ROOT / "deepy.py"), "serve.py", str(config)]
    return Server(command, None, port)


def llama_cpp(program: str, model: str, port: int) -> Server:
    rows, threads = ["-np", str(CLIENTS), "-c", str(CLIENTS * CONTEXT)], str(THREADS)
    command = [program, "-m", model, "--port", str(port), "-t", threads, "-tb", threads]
    return Server([*command, *rows, "--no-ui"], None, port)


def transformers(model: str, port: int) -> Server:
    """With continuous batching; its cache would take most of the memory unless told a size."""
    command = [str(Path(sys.executable).with_name("transformers")), "serve", model]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32"]
    command += ["--continuous-batching", "--cb-block-size", "32"]
    command += ["--cb-num-blocks", str(CLIENTS * CONTEXT // 32), "--cb-max-batch-tokens", "512"]
    return Server(command, model, port)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def running(name: str, server: Server, folder: Path) -> Iterator[None]:
    """The server's process, which answers once this is entered. Ends the benchmark if it fails."""
    import httpx

    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
    output = folder / f"{name}.log"
    with output.open("w") as file:
        process = subprocess.Popen(
            server.command, env=environment, stdout=file, stderr=subprocess.STDOUT, cwd=folder
        )
    try:
        end = time.monotonic() + START
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{server.address}/health").status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > end:
                sys.exit(f"{name} did not start:\n{output.read_text()[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def draw(load: Load, folder: Path, seed: int) -> list[Request]:
    """The requests of a round: texts of the documentation of Python's topics."""
    import pydoc_data.topics

    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(peer_models.tokenizer_of(folder)))
    tokens = tokenizer.encode("\n".join(pydoc_data.topics.topics.values())).ids
    chance = random.Random(seed)
    requests = []
    for _ in range(CLIENTS * load.requests):
        length = chance.randint(*PROMPT)
        start = chance.randrange(len(tokens) - length)
        text = tokenizer.decode(tokens[start : start + length])
        requests.append(Request(text, chance.randint(*NEW)))
    return requests


def compete(
    load: Load, contestants: Mapping[str, Server], folder: Path
) -> tuple[dict[str, list[Turn]], dict[str, float]]:
    """Every round's turns, and the share of each one's answers that are ours when asked alone."""
    names = list(contestants)
    turns: dict[str, list[Turn]] = {name: [] for name in names}
    with contextlib.ExitStack() as stack:
        for name, server in contestants.items():
            stack.enter_context(running(name, server, folder))
        bar = stack.enter_context(log.progress(total=load.rounds, desc="load", unit=" rounds"))
        for i in range(load.rounds + 1):
            requests = draw(load, folder, seed=i)
            for name in names if i % 2 else reversed(names):
                asked = requests if i else requests[:4]  # round 0 warms up
                server = contestants[name]
                turn = asyncio.run(ask(server.address, server.model, asked, CLIENTS))
                if i:
                    turns[name].append(turn)
            bar.update(i > 0)
        alone = asyncio.run(ask(contestants["ours"].address, None, requests, 1)).answers
    same = {
        name: sum(a.text == b.text for a, b in zip(of_one[-1].answers, alone, strict=True))
        for name, of_one in turns.items()
    }
    return turns, {name: count / len(alone) for name, count in same.items()}


def report(turns: Mapping[str, list[Turn]], same: Mapping[str, float]) -> dict[str, float]:
    """Print the table and return the figures."""

    def median(name: str, what: str, *arguments: float) -> float:
        found = (getattr(turn, what) for turn in turns[name])
        return statistics.median(each(*arguments) if arguments else each for each in found)

    print(
        f"{'':14}{'tokens/s':>10}{'latency p50':>13}{'p95':>9}{'first token p50':>17}{'p95':>9}"
        f"{'as ours alone':>16}"
    )
    for name in turns:
        print(
            f"{name:14}{median(name, 'tokens_per_s'):10.1f}"
            f"{median(name, 'latency', 0.5):11.2f} s{median(name, 'latency', 0.95):7.2f} s"
            f"{median(name, 'first', 0.5):15.2f} s{median(name, 'first', 0.95):7.2f} s"
            f"{same[name]:16.1%}"
        )
    figures = {"answers_as_alone": same["ours"]}
    for name in turns:
        if name == "ours":
            continue
        pairs = list(zip(turns["ours"], turns[name], strict=True))
        peer = name.replace(".", "_")
        for figure, ratios in (
            (f"tokens_per_s_over_{peer}", [a.tokens_per_s / b.tokens_per_s for a, b in pairs]),
            (f"p95_latency_over_{peer}", [a.latency(0.95) / b.latency(0.95) for a, b in pairs]),
        ):
            figures[figure] = statistics.median(ratios)
            print(f"{figure:32}{figures[figure]:8.3f}   ({min(ratios):.2f} to {max(ratios):.2f})")
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model instead of the 160M one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.add_argument("--precision", choices=list(peer_models.GGUF_TYPES), default="fp32")
    arguments = parser.parse_args()
    load, precision = QUICK if arguments.quick else FULL, arguments.precision

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        needed = (precision,) if llama_server() else ()
        peer_models.write(load.shape, folder, gguf=needed)
        turns, same = compete(load, servers(load.shape, folder, precision), folder)
    print(
        f"{load.shape.name}, {precision}: {CLIENTS} clients, {CLIENTS * load.requests} requests in "
        f"each of {load.rounds} rounds, {THREADS} threads; medians"
    )
    figures = report(turns, same)
    if arguments.json:
        write_text(arguments.json, json.dumps(figures) + "\n")


if __name__ == "__main__":
    main()
