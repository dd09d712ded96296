"""Keys of users' issuers: whatever key IDs callers think of, the issuer is asked seldom; what was begun is closed."""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from broker.errors import InvalidToken, Misconfigured, Unavailable
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


async def test_all_who_come_first_wait_for_the_one_fetch_also_when_one_of_them_leaves(
    issuer: OidcIssuer, keys: IssuerKeys
) -> None:
    first, *others = [asyncio.ensure_future(keys.find("key-1")) for _ in range(100)]
    await asyncio.sleep(0)
    first.cancel()
    found = await asyncio.gather(*others)
    assert all(one is found[0] for one in found)
    assert issuer.fetched["/jwks"] == 1


@pytest.mark.parametrize("speaks", [True, False])
async def test_closing_closes_a_connection_that_is_being_made(
    issuer: OidcIssuer, clock: ManualClock, speaks: bool
) -> None:
    """Of a peer that says nothing in the handshake, too: what stays open here would stay open until the program ends."""
    came, gone = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        if speaks:
            writer.write(b"\x16\x03\x03")  # the beginning of a record
        with contextlib.suppress(ConnectionResetError):
            while await reader.read(1 << 16):
                pass
        writer.close()
        gone.set()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        trusted = SubjectIssuer(f"https://127.0.0.1:{port}", frozenset({"broker"}), ca_path=issuer.ca_path)
        keys = IssuerKeys(trusted, clock)
        asked = asyncio.ensure_future(keys.find("key-1"))
        await asyncio.wait_for(came.wait(), 30)
        await keys.aclose()
        with pytest.raises(Unavailable):
            await asked
        await asyncio.wait_for(gone.wait(), 30)
        came.clear()
        with pytest.raises(Unavailable):
            await keys.find("key-1")
        assert not came.is_set(), "nothing is begun once it is closed"


@pytest.mark.bears("I15")
async def test_an_issuers_document_leads_nobody_into_the_network_here(issuer: OidcIssuer, clock: ManualClock) -> None:
    # The same port by another name: the issuer itself is where the operator said, its keys are where its document says.
    elsewhere = issuer.issuer.replace("localhost", "127.0.0.1") + "/jwks"
    trusted = SubjectIssuer(issuer=issuer.issuer, audiences=frozenset({"broker"}), ca_path=issuer.ca_path)
    issuer.jwks_uri = elsewhere
    keys = IssuerKeys(trusted, clock)
    with pytest.raises(Unavailable):
        await keys.find("key-1")
    await keys.aclose()
    assert "/jwks" not in issuer.fetched
    # Whom the operator sends there is served: the address is good.
    told = dataclasses.replace(trusted, jwks_url=elsewhere)
    keys = IssuerKeys(told, clock, address=told.jwks_url)
    await keys.find("key-1")
    await keys.aclose()
    assert issuer.fetched["/jwks"] == 1


@pytest.mark.bears("I15")
@pytest.mark.parametrize("url", ["http://idp.example/jwks", "file:///etc/passwd", "https://u:p@idp.example/jwks"])
def test_where_no_keys_are_looked_for(url: str) -> None:
    with pytest.raises(Misconfigured):
        SubjectIssuer("https://idp.example", frozenset({"broker"}), jwks_url=url)
