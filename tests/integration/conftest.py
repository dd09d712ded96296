"""A whole estate of real processes: server, node agent, OpenID issuer, an agent pod, a service."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from broker.dev import demo_identity, demo_task
from broker.dev.stage import Stage
from tests.integration.control_groups import forging
from tests.integration.docker_engine import Engine, docker_engine

STORY = (
    demo_identity.estate,
    demo_identity.entries,
    demo_identity.attestation,
    demo_task.user,
    demo_task.task,
    demo_task.token,
)


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that every user may enter, with a short name: a Unix socket's path has at most 107 bytes."""
    made = Path(tempfile.mkdtemp(dir="/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@pytest.fixture
async def estate() -> AsyncIterator[Stage]:
    """The programs run; nobody is registered."""
    async with Stage() as stage:
        await demo_identity.estate(stage)
        yield stage


@pytest.fixture
async def stage() -> AsyncIterator[Stage]:
    """The pod holds a token of a running task, and the service runs."""
    async with Stage() as stage:
        for act in STORY:
            await act(stage)
        yield stage


@pytest.fixture(scope="session")
def engine() -> Iterator[Engine]:
    """One Docker Engine for every test that needs one."""
    with docker_engine() as running:
        yield running


@pytest.fixture
def forge() -> Iterator[Callable[..., int]]:
    """Puts a process of this host into control groups of its choosing."""
    with forging() as put:
        yield put
