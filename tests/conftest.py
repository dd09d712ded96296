"""What holds for every test: what needs root says so by its mark, and is skipped with its reason elsewhere."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.postgresql import Cluster
from tests.side_by_side import Controller, Room

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


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("numprocesses", None):
        config.pluginmanager.register(Controller())


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside the timeout: waiting for a turn is not the test's time
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    told = getattr(item.config, "workerinput", None)
    if told is None:
        return (yield)
    with Room(Path(told["room"])).entered(alone=item.get_closest_marker("alone") is not None):
        return (yield)


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
