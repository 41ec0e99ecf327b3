"""deepy.py's whole course: command line, configuration, processes, exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from neox import log
from neox.cluster.arguments import DEFAULT_CONFIG, Arguments, parse
from neox.cluster.hosts import cores
from neox.cluster.launch import find_devices, launch, make_plan, run_started
from neox.cluster.place import Started, find_started
from neox.config import Devices, NeoXConfig, load_config
from neox.errors import NeoXError


def main(argv: Sequence[str]) -> int:
    """Run a command line; return the exit status."""
    return exit_status(lambda: _run(parse(argv)))


def exit_status(run: Callable[[], int]) -> int:
    """What `run` returns or, for an error, its status: what the user did wrong is a line and 2."""
    try:
        return run()
    except NeoXError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BrokenPipeError:  # as in `deepy.py ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # for what is still to be flushed at exit
        return 128 + signal.SIGPIPE


def _run(arguments: Arguments) -> int:
    started = None if arguments.dry_run else find_started(os.environ)
    if started is None:
        config = _load(arguments, _find_devices_elsewhere if arguments.dry_run else find_devices)
        if arguments.dry_run:
            print(config.describe())
            return 0
        return launch(arguments.entry_point, arguments.script, config, make_plan(config))
    return _run_one(arguments, started)


def _run_one(arguments: Arguments, started: Started) -> int:
    """This process's share, where srun or mpirun has started one for each rank."""
    log.set_rank(started.place.rank)
    try:
        config = _load(arguments, lambda config: Devices(started.sizes, cores(), all_start=True))
    except NeoXError:
        if started.place.rank > 0:
            return 2  # rank 0 reads the same files and says it
        raise
    return run_started(arguments.entry_point, arguments.script, config, started)


def _load(arguments: Arguments, world_size: Callable[[NeoXConfig], Devices | None]) -> NeoXConfig:
    files = arguments.files
    if not files:
        log.info("no configuration file given: using configs/20B.yml")
        files = (DEFAULT_CONFIG,)
    return load_config(
        files,
        arguments.overrides,
        conf_dir=arguments.conf_dir,
        purpose=arguments.entry_point,
        world_size=world_size,
        # Somebody may look here at what is to run elsewhere.
        check_files=not arguments.dry_run,
    )


def _find_devices_elsewhere(config: NeoXConfig) -> Devices | None:
    """None, that is unknown, where the hostfile is on another machine."""
    if config.hostfile and not Path(config.hostfile).is_file():
        return None
    return find_devices(config)
