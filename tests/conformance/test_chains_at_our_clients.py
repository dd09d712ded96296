"""The same chains shown to us: by a server that a node agent dials, and by a bundle endpoint whose bundle is fetched; I02."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import pytest

from broker._proto.service import Stub
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker.agent.upstream import BUNDLE
from broker.clock import SystemClock
from broker.errors import BrokerError, Misconfigured
from broker.server.identity.endpoint_client import EndpointClient
from broker.spiffe import SpiffeId
from broker.spiffe.federation import Profile, Relationship
from broker.transport.dialer import SpiffeDialer
from broker.transport.tls import TlsIdentity, public_context
from tests.conformance.house import DOMAIN, ONE, SECONDS, House
from tests.conformance.test_chains_at_the_port import Chains, ours
from tests.fakes.bundle_endpoints import endpoint, ok
from tests.fakes.svid_pki import Holder

WHO = SpiffeId(ONE)
"""Whom the leaves name, and whom both clients are told to expect."""


def identity(chain: list[Holder]) -> TlsIdentity:
    return TlsIdentity(tuple(one.der for one in chain), chain[0].key)


async def fetched(house: House, chain: list[Holder]) -> bool:
    """Whether a bundle endpoint that shows this chain is asked anything, and its answer taken."""
    trusted = house.bundles[DOMAIN]
    try:
        async with endpoint(identity(chain), lambda _: ok(trusted.to_json())) as one:
            relationship = Relationship(DOMAIN, one.url(), Profile.HTTPS_SPIFFE, WHO)
            try:
                await EndpointClient(SystemClock()).fetch(relationship, trusted)
            except BrokerError:
                assert one.seen == []
                return False
            return True
    except Misconfigured:
        return False  # OpenSSL does not even load it to show it


@asynccontextmanager
async def listening(chain: list[Holder]) -> AsyncIterator[tuple[int, "asyncio.Future[bytes]"]]:
    """A port that shows this chain; the future gives the first bytes that are said to it, b"" for none."""
    said: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first = await reader.read(24)
        if not said.done():
            said.set_result(first)
        writer.transport.abort()

    context = public_context(identity(chain))
    context.set_alpn_protocols(["h2"])
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1], said


async def dialled(house: House, chain: list[Holder]) -> bool:
    """Whether an agent's connection to a server that shows this chain gets as far as HTTP/2's first words."""
    bundles = house.bundles
    try:
        async with listening(chain) as (port, said):
            dialer = SpiffeDialer(
                f"127.0.0.1:{port}", identity=lambda: None, bundles=lambda: bundles, expect=WHO, clock=SystemClock()
            )
            async with dialer as channel:
                with pytest.raises(grpc.aio.AioRpcError):
                    await Stub(channel, BUNDLE).GetBundle(bundle_pb2.GetBundleRequest(), timeout=SECONDS)
            return said.done() and said.result().startswith(b"PRI * HTTP/2.0")
    except Misconfigured:
        return False


@pytest.mark.bears("I02", "FE-14")
@pytest.mark.parametrize("client", [fetched, dialled])
async def test_chains_that_are_good_in_any_order(house: House, client) -> None:
    chains = Chains(house).good()
    assert {name: await client(house, chain) for name, chain in chains.items()} == dict.fromkeys(chains, True)


@pytest.mark.bears("I02", "FE-14")
@pytest.mark.parametrize("client", [fetched, dialled])
async def test_chains_that_nobody_vouches_for(house: House, client) -> None:
    chains = Chains(house).bad()
    assert [name for name, chain in chains.items() if ours(house, chain) == ""] == []
    assert [name for name, chain in chains.items() if await client(house, chain)] == []


@pytest.mark.bears("I02", "FE-14")
@pytest.mark.parametrize("client", [fetched, dialled])
async def test_a_good_chain_of_somebody_else(house: House, client) -> None:
    assert not await client(house, [house.replica.leaf(f"spiffe://{DOMAIN.name}/conformance/two")])
