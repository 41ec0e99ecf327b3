"""The cluster that these tests share. Only `make test-cluster` collects them: they need root."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clusters.cluster import Cluster
from tests.clusters.packages import NoCluster
from tests.clusters.training import Training

_HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave them out unless the command line names them."""
    named = [Path(argument.partition("::")[0]).resolve() for argument in config.args]
    return None if any(path.is_relative_to(_HERE) for path in named) else True


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two hosts, alpha and beta, idle."""
    try:
        made = Cluster()
    except NoCluster as error:
        pytest.exit(f"error: no cluster can be made here: {error}", returncode=1)
    with made:
        yield made


@pytest.fixture
def train(cluster: Cluster) -> Iterator[Callable[..., Training]]:
    """train(name, *arguments, **values) begins a Training, which does not outlive the test."""
    runs = []

    def begin(name: str, *arguments: str, **values: Any) -> Training:
        runs.append(Training(cluster, name, *arguments, **values))
        return runs[-1]

    yield begin
    cluster.restore("beta")
    for run in runs:
        if run.process.poll() is None:
            cluster["alpha"].signal(run.process, signal.SIGINT)
            try:
                run.process.wait(30)
            except subprocess.TimeoutExpired:
                cluster["alpha"].signal(run.process, signal.SIGKILL)
