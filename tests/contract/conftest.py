"""Every adapter of the store, asked through the port alone. A new adapter is one more line in ADAPTERS."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest

from broker.clock import SystemClock
from broker.server.store.ports import Store
from broker.server.store.stores import open_store
from tests.contract.acts import Opener


def _sqlite(request: pytest.FixtureRequest) -> str:
    directory: Path = request.getfixturevalue("tmp_path")
    return f"sqlite://{directory}/broker.db"


def _postgres(request: pytest.FixtureRequest) -> str:
    url: str = request.getfixturevalue("postgresql")
    return url


ADAPTERS: dict[str, Callable[[pytest.FixtureRequest], str]] = {"sqlite": _sqlite, "postgres": _postgres}


@pytest.fixture(params=sorted(ADAPTERS))
def opener(request: pytest.FixtureRequest) -> Opener:
    url = ADAPTERS[request.param](request)

    def open_again() -> AbstractAsyncContextManager[Store]:
        return open_store(url, clock=SystemClock())

    return open_again


@pytest.fixture
async def store(opener: Opener) -> AsyncIterator[Store]:
    async with opener() as opened:
        yield opened
