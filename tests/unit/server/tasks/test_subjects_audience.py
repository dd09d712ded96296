"""Whom a user token is for: an audience of ours and no client's, among few."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from broker.errors import InvalidToken
from broker.server.tasks.config import SubjectIssuer
from broker.server.tasks.subjects import MAX_AUDIENCES, Subjects
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import ManualClock


@pytest.fixture
async def subjects(oidc: OidcIssuer) -> AsyncIterator[Subjects]:
    issuer = SubjectIssuer(oidc.issuer, frozenset({"broker"}), clients=frozenset({"portal"}), ca_path=oidc.ca_path)
    trusted = Subjects([issuer], ManualClock())
    yield trusted
    await trusted.aclose()


def token(oidc: OidcIssuer, **claims: Any) -> str:
    return oidc.token(now=ManualClock().now().timestamp(), **claims)


async def test_a_client_that_is_accepted_is_no_audience(oidc: OidcIssuer, subjects: Subjects) -> None:
    assert (await subjects.verify(token(oidc, aud="broker", azp="portal"))).client == "portal"
    with pytest.raises(InvalidToken) as caught:
        await subjects.verify(token(oidc, aud="portal", azp="portal"))
    assert caught.value.reason == "subject_audience"


async def test_a_token_for_very_many_is_for_nobody(oidc: OidcIssuer, subjects: Subjects) -> None:
    others = [f"service-{number}" for number in range(MAX_AUDIENCES - 1)]
    assert (await subjects.verify(token(oidc, aud=["broker", *others], azp="portal"))).user == "alice"
    with pytest.raises(InvalidToken) as caught:
        await subjects.verify(token(oidc, aud=["broker", *others, "one-more"], azp="portal"))
    assert caught.value.reason == "subject_audience"
