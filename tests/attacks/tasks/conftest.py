"""One OpenID issuer for a module of attacks, and a directory for a server whose sockets have short names."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import Estate


@pytest.fixture(scope="module")
def oidc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path_factory.mktemp("oidc")) as issuer:
        yield issuer


@pytest.fixture
def ground_of(request: pytest.FixtureRequest) -> Iterator[Estate]:
    """Where a server lives: on SQLite, or, asked for by an indirect parameter, on PostgreSQL."""
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    is_postgres = getattr(request, "param", "sqlite") == "postgres"
    yield Estate(directory, request.getfixturevalue("postgresql") if is_postgres else "")
    shutil.rmtree(directory)
