"""Keys of users' issuers: whatever key IDs callers think of, the issuer is asked seldom."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from broker.errors import InvalidToken
from broker.server.tasks.config import SubjectIssuer
from broker.server.tasks.issuer_keys import REFRESH_EVERY, IssuerKeys
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import ManualClock

STRANGERS = 10_000


@pytest.fixture
def issuer(tmp_path: Path) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path) as running:
        yield running


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def keys(issuer: OidcIssuer, clock: ManualClock) -> AsyncIterator[IssuerKeys]:
    trusted = SubjectIssuer(issuer=issuer.issuer, audiences=frozenset({"broker"}), ca_path=issuer.ca_path)
    made = IssuerKeys(trusted, clock)
    yield made
    await made.aclose()


async def refused(keys: IssuerKeys, kid: str) -> None:
    with pytest.raises(InvalidToken) as caught:
        await keys.find(kid)
    assert caught.value.reason == "subject_key_unknown"


@pytest.mark.bears("K08")
async def test_ten_thousand_unknown_key_ids_ask_the_issuer_once(
    issuer: OidcIssuer, clock: ManualClock, keys: IssuerKeys
) -> None:
    known = await keys.find("key-1")
    assert issuer.fetched["/jwks"] == 1
    for number in range(STRANGERS):
        await refused(keys, f"stranger-{number}")
    assert issuer.fetched["/jwks"] == 1
    # And all at once, in the moment in which one of them may look again: one does.
    clock.advance(REFRESH_EVERY)
    await asyncio.gather(*(refused(keys, f"crowd-{number}") for number in range(1000)))
    assert issuer.fetched["/jwks"] == 2
    assert await keys.find("key-1") == known
    assert keys._kept is not None
    assert len(keys._kept.keys) == 1, "nothing of what was asked for is kept"


async def test_who_comes_while_the_keys_are_fetched_for_the_first_time_waits_for_them(
    issuer: OidcIssuer, keys: IssuerKeys
) -> None:
    found = await asyncio.gather(*(keys.find("key-1") for _ in range(100)))
    assert len(set(map(id, found))) == 1
    assert issuer.fetched["/jwks"] == 1
