"""`./deepy.py plan.py`: what a run needs, before it runs. One process, no device."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from neox import log
from neox.atomic import write_text
from neox.config import NeoXConfig
from neox.errors import ConfigError, DataError
from neox.model.gpt import count_parameters
from neox.plan.cluster import Cluster, load_cluster
from neox.plan.generation import generation
from neox.plan.memory import memory
from neox.plan.messages import work
from neox.plan.picture import check_picture, draw
from neox.plan.report import Plan, as_json, show, show_nearest, show_search
from neox.plan.search import Candidate, Models, Seconds, nearest, search
from neox.plan.time import run_cost, step_time, step_timeline
from neox.plan.trace import planned_world
from neox.plan.traffic import shape_of
from neox.plan.work import Work
from neox.tokenizer import build_tokenizer

_TOKENS = 50277  # of GPT-NeoX-20B's tokenizer, where the configuration's is not here
_FARTHEST = 10  # times the number of devices is doubled to find one that fits


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    cluster: str | None = None
    search: bool = False
    vocab_size: int | None = None
    json: str | None = None
    picture: str | None = None


def main(config: NeoXConfig, options: Options) -> None:
    """Print the plan of a training run. Raises ConfigError."""
    if options.picture is not None:
        check_picture(Path(options.picture))
        if options.cluster is None:
            raise ConfigError("--picture shows times, which need --cluster.")
    cluster = load_cluster(options.cluster) if options.cluster else None
    room = _memory(cluster, config.world_size)
    with planned_world():
        models = Models(_tokens(config, options.vocab_size), on_cpu=_is_cpu(cluster))
        plan = _plan(models, config, cluster, room)
        print(show(plan), flush=True)
        found: list[Candidate] = []
        seconds = _seconds(cluster)
        if options.picture is not None and cluster is not None:
            _draw(plan, models.rows(config), cluster, Path(options.picture))
        if options.search:
            started = time.perf_counter()
            found = search(models, config, config.world_size, room, seconds)
            print(f"\n{show_search(found, room, time.perf_counter() - started)}")
        if not plan.fits:
            tried, best = _nearest(models, config, cluster, found)
            print(f"\n{show_nearest(best, tried)}")
    if options.json is not None:
        try:
            write_text(Path(options.json), json.dumps(as_json(plan, found), indent=1) + "\n")
        except OSError as error:
            raise ConfigError(f"--json {options.json} cannot be written: {error}") from None


def _plan(models: Models, config: NeoXConfig, cluster: Cluster | None, room: float) -> Plan:
    model = models.of(config)
    if stages := model.untrained():
        from neox.engine.pipelined import nothing_to_train  # with DeepSpeed

        raise nothing_to_train(config, stages)
    rows = models.rows(config)
    done = work(model)
    return Plan(
        config=config,
        parameters=count_parameters(config, rows),
        device=cluster.device if cluster else "this machine's memory",
        memory=room,
        stages=memory(model),
        generation=generation(model),
        work=done,
        time=_time(config, rows, done, cluster) if cluster else {},
    )


def _time(config: NeoXConfig, rows: int, done: Work, cluster: Cluster) -> dict[str, float]:
    step = step_time(done, shape_of(config, rows), cluster)
    found = {"step, s": step.seconds}
    found |= {f"  {name}, s": part for name, part in step.parts.items()}
    found["tokens/s"] = step.tokens_per_second
    found["FLOP/s of a device"] = step.flops_per_second
    if config.train_iters is not None:
        run = run_cost(step.seconds, config.train_iters, config.world_size, cluster.price)
        found |= {"run, days": run.days, "run, device hours": run.device_hours}
        found |= {"run, price": run.price} if run.price is not None else {}
    return found


def _draw(plan: Plan, rows: int, cluster: Cluster, path: Path) -> None:
    try:
        draw(step_timeline(plan.work, shape_of(plan.config, rows), cluster), path)
    except OSError as error:
        raise ConfigError(f"--picture {path} cannot be written: {error}") from None


def _seconds(cluster: Cluster | None) -> Seconds | None:
    if cluster is None:
        return None
    return lambda config, rows, done: step_time(done, shape_of(config, rows), cluster).seconds


def _nearest(
    models: Models, config: NeoXConfig, cluster: Cluster | None, found: list[Candidate]
) -> tuple[list[int], Candidate | None]:
    """The devices tried and the first of them that has a grid that fits."""
    tried: list[int] = []
    for doubled in range(_FARTHEST):
        tried.append(config.world_size << doubled)
        room = _memory(cluster, tried[-1])
        if not (found and len(tried) == 1):
            found = search(models, config, tried[-1], room)
        best = nearest(found, config)
        if best is not None or cluster is None:
            return tried, best
    return tried, None


def _memory(cluster: Cluster | None, ranks: int) -> float:
    """Bytes for each rank: of its device, or its share of this machine's memory."""
    if cluster is not None:
        return cluster.for_ranks(ranks).memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / ranks


def _is_cpu(cluster: Cluster | None) -> bool:
    return cluster is None or cluster.shared


def _tokens(config: NeoXConfig, given: int | None) -> int:
    """Of the vocabulary, before it is padded."""
    if given is not None:
        if given < 1:
            raise ConfigError(f"--vocab_size is {given}, but a vocabulary has a token or more.")
        return given
    try:
        return build_tokenizer(config).vocab_size
    except DataError:
        log.info(
            f"no tokenizer here: a vocabulary of {_TOKENS} tokens is assumed, as GPT-NeoX-20B has "
            "(--vocab_size N is another)"
        )
        return _TOKENS
