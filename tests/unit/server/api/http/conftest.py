"""One issuer for a module of tests; an estate and an open door for each test."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fakes.oidc import OidcIssuer
from tests.unit.server.api.http.door import HttpDoorway, open_door
from tests.unit.server.tasks.estate import running


@pytest.fixture(scope="module")
def oidc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path_factory.mktemp("oidc")) as issuer:
        yield issuer


@pytest.fixture
async def door(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[HttpDoorway]:
    async with running(tmp_path, oidc) as estate, open_door(estate) as opened:
        yield opened
