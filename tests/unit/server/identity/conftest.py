import pytest

from tests.unit.server.identity.world import world


@pytest.fixture
async def here(tmp_path):
    async with world(tmp_path) as one:
        yield one
