"""Every rank's decoder gets the same commands in the same order; rank 0's clients get answers."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
import torch

from neox.errors import RequestError
from neox.inference.request import Request
from neox.parallel.groups import ProcessGroups
from neox.parallel.topology import Topology
from neox.serving import engine as engine_module
from neox.serving.engine import Engine
from neox.serving.metrics import Metrics
from neox.serving.replica import Accepted, Cancel, Replica, Stop, Submit, follow
from tests.serving.fakes import FORBIDDEN, FakeDecoder
from tests.world import World

ENDLESS = 10**9  # tokens: whoever leaves such an answer does so before its end


def ask(count: int = 3, **values: Any) -> Request:
    return Request((1,), count, **values)


def test_commands_become_events() -> None:
    replica = Replica(FakeDecoder(rows=1), ProcessGroups.single())
    events = replica.advance([Submit(7, ask(1)), Submit(9, ask()), Cancel(9), Cancel(5)])
    assert events is not None
    (first, accepted), (second, also), (third, progress) = events
    assert (first, second, third) == (7, 9, 7)
    assert accepted == also == Accepted()
    assert (progress.text, progress.finish) == ("a", "length")
    assert replica.advance([]) == []
    refused = replica.advance([Submit(1, ask(stop=(FORBIDDEN,)))])
    assert refused is not None and isinstance(refused[0][1], RequestError)
    assert replica.advance([Submit(2, ask()), Stop()]) is None


def serve(rank: int, tp: int, pp: int) -> tuple[list[Request], list[int], list[str]]:
    """Rank 0 answers three sequences, one of which is refused and one left; what a decoder saw."""
    groups = ProcessGroups(Topology(tp=tp, pp=pp), rank, torch.device("cpu"))
    decoder = FakeDecoder(rows=2)
    replica = Replica(decoder, groups)
    if rank > 0:
        follow(replica)
        return decoder.submitted, decoder.cancelled, []
    engine_module.HEARTBEAT_S = 0.01  # of which many pass
    texts: list[str] = []
    engine = Engine(4, 60.0, Metrics())

    async def client() -> None:
        engine.attach()
        ready.set()
        while engine.state != "ready":
            await asyncio.sleep(0.001)
        async with engine.running([ask(), ask(5, seed=1)]) as run:
            async for index, progress in run.progress():
                texts.append(f"{index}{progress.text}")
        with pytest.raises(RequestError):
            async with engine.running([ask(), ask(stop=(FORBIDDEN,))]):
                raise AssertionError
        async with engine.running([ask(ENDLESS, minimum_tokens=ENDLESS)]) as run:
            await anext(run.progress())
        await asyncio.sleep(0.05)  # heartbeats
        engine.stop()

    ready = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(client()))
    thread.start()
    ready.wait()
    engine.open(decoder)
    engine.run(replica)
    thread.join()
    texts.sort(key=lambda text: text[0])  # each answer keeps its order
    return decoder.submitted, decoder.cancelled, texts


TEXTS = ["0a", "0b", "0c", "1b", "1c", "1d", "1e", "1f"]


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
def test_other_ranks_follow(world: World, tp: int, pp: int) -> None:
    (submitted, cancelled, texts), other = world.run(2, serve, tp, pp)
    assert texts == TEXTS
    assert len(submitted) == 4 and cancelled[-1] == 4
    assert other == (submitted, cancelled, [])


def test_alone_it_does_the_same() -> None:
    assert serve(0, 1, 1)[2] == TEXTS
