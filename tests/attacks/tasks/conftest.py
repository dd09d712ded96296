"""One OpenID issuer for a module of attacks."""

from collections.abc import Iterator

import pytest

from tests.fakes.oidc import OidcIssuer


@pytest.fixture(scope="module")
def oidc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path_factory.mktemp("oidc")) as issuer:
        yield issuer
