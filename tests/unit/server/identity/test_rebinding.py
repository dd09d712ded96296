"""A name that leads elsewhere each time it is looked up (DNS rebinding): the address that is dialled is what counts; I15."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

import pytest

from broker.clock import SystemClock
from broker.errors import Refused
from broker.server.identity.endpoint_client import EndpointClient
from broker.spiffe import TrustDomain
from broker.spiffe.federation import Profile, Relationship, is_reachable
from tests.fakes.bundle_endpoints import Endpoint, WebAuthority, endpoint, ok, redirect
from tests.unit.transport.pki import Authority

OTHER = TrustDomain("other.test")
WEB, SERVED = WebAuthority(), Authority("other.test").bundle
REBOUND = "rebound.test"
PUBLIC = "93.184.216.34"
"""Where the name leads for whoever asks before the connection is made."""


@pytest.fixture
def lookups(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name leads into the world when it is looked up first, and to this machine from then on."""
    asked: list[str] = []
    truly = socket.getaddrinfo

    def rebinding(host, port, *more, **options):
        name = host.decode() if isinstance(host, bytes) else host
        if name != REBOUND:
            return truly(host, port, *more, **options)
        asked.append(name)
        return truly(PUBLIC if len(asked) == 1 else "127.0.0.1", port, *more, **options)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    return asked


@asynccontextmanager
async def leading_inside() -> AsyncIterator[tuple[Relationship, Endpoint]]:
    """An endpoint that redirects to the name, and what waits there."""
    async with endpoint(WEB.issue(REBOUND), lambda line: ok(SERVED.to_json())) as inside:
        answer = redirect(inside.url(REBOUND))
        async with endpoint(WEB.issue("127.0.0.1"), lambda line: answer) as one:
            yield Relationship(OTHER, one.url(), Profile.HTTPS_WEB), inside


@pytest.mark.bears("I15")
async def test_a_name_that_is_bound_anew_leads_nobody_inside(tmp_path, lookups) -> None:
    client = EndpointClient(SystemClock(), WEB.write(tmp_path / "web.pem"))
    async with leading_inside() as (relationship, inside):
        socket.getaddrinfo(REBOUND, None)  # somebody has looked already: now it leads here
        with pytest.raises(Refused) as refused:
            await client.fetch(relationship, None)
        assert refused.value.reason == "redirect_refused"
        assert len(lookups) == 2, "the client has looked it up once, and dialled what it was told"
        assert inside.seen == []


async def test_who_looks_first_and_dials_then_is_led_inside(tmp_path, lookups) -> None:
    # A control: the check that is usually written asks the resolver itself, and lets the connection ask again.
    context = EndpointClient(SystemClock(), WEB.write(tmp_path / "web.pem"))._web_context()
    async with leading_inside() as (relationship, inside):
        url = inside.url(REBOUND)
        ((*_, (address, *_)), *_) = socket.getaddrinfo(REBOUND, None, family=socket.AF_INET)
        assert is_reachable(relationship, url, address)
        reader, writer = await asyncio.open_connection(REBOUND, urlsplit(url).port, ssl=context)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert b"200" in await reader.readline()
        writer.transport.abort()
        assert inside.seen == ["GET / HTTP/1.1"]
