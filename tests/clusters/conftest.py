"""The cluster that these tests share. Only `make test-cluster` collects them: they need root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clusters.cluster import Cluster
from tests.clusters.packages import NoCluster

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
