"""What holds for every test: what needs root says so by its mark, and is skipped with its reason elsewhere."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.postgresql import Cluster

# The same examples in every run, and no failure because a machine is busy.
settings.register_profile("steady", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    for item in items:
        mark = item.get_closest_marker("root")
        if mark is not None:
            item.add_marker(pytest.mark.skip(reason=f"needs root: {mark.args[0] if mark.args else 'see the test'}"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A PostgreSQL server that all tests of the run share; whoever stops it starts it again."""
    one = Cluster()
    try:
        why = one.unusable()
        if why is not None:
            pytest.skip(why)
        one.make()
        one.start()
        yield one
    finally:
        one.remove()


@pytest.fixture
def postgresql(cluster: Cluster) -> Iterator[str]:
    """The URL of an empty PostgreSQL database of one's own (a schema, to be exact)."""
    url = cluster.schema()
    yield url
    cluster.drop_schema(url)
