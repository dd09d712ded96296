"""One issuer for a module of tests, one estate for each test."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import Estate, running


@pytest.fixture(scope="module")
def oidc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path_factory.mktemp("oidc")) as issuer:
        yield issuer


@pytest.fixture
async def estate(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Estate]:
    async with running(tmp_path, oidc) as open_estate:
        yield open_estate
