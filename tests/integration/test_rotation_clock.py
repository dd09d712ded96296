"""Clocks that are stepped while authorities come and go: peers of other machines notice nothing of it; K09, C03."""

import asyncio
import itertools
import ssl
from contextlib import AsyncExitStack
from datetime import timedelta

import pytest

from broker._proto.spiffe import workload_pb2
from broker.sdk.tls import require_peer
from broker.spiffe import SpiffeId
from tests.fakes.loaded_workloads import Client
from tests.fakes.running_agent import HEADER, until
from tests.fakes.small_estate import running_agent, running_server
from tests.unit.transport.clocks import HandClock

STEP = timedelta(seconds=30)
"""There and back again: what is signed is back-dated by as much, and no further."""


def shake_hands(client, name, server, peer):
    """One mutual TLS handshake, in memory, judged on both sides by the SDK."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.client_context(name).wrap_bio(to_client, to_server),
        server.server_context(peer).wrap_bio(to_server, to_client, server_side=True),
    )
    waiting = set(ends)
    for end in itertools.cycle(ends):
        if not waiting:
            break
        if end in waiting:
            try:
                end.do_handshake()
                waiting.discard(end)
            except ssl.SSLWantReadError:
                pass
    for end, who, expected in ((ends[0], client, peer), (ends[1], server, name)):
        require_peer(end, who.bundles, {SpiffeId(expected)})


async def everybody_with_everybody(clients):
    """Each workload shakes hands with each, and each one's token is checked at every agent; this process's clock is right."""
    for client, server in itertools.product(clients, clients):
        for name, peer in itertools.product(client.identities, server.identities):
            shake_hands(client, name, server, peer)
        asked = workload_pb2.JWTSVIDRequest(audience=["aud"])
        for svid in (await client.stub.FetchJWTSVID(asked, metadata=HEADER, timeout=30)).svids:
            check = workload_pb2.ValidateJWTSVIDRequest(audience="aud", svid=svid.svid)
            await server.stub.ValidateJWTSVID(check, metadata=HEADER, timeout=30)


@pytest.mark.timeout(120)
@pytest.mark.bears("K09", "C03")
@pytest.mark.parametrize("way", [1, -1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("whose", ["the server's", "an agent's", "everybody's"])
async def test_a_clock_that_is_stepped_in_the_middle_of_a_rotation(directory, whose, way):
    stepped, failures = HandClock(), []
    clocks = [stepped if whose in {of, "everybody's"} else HandClock() for of in ("the server's", "an agent's", "")]
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(running_server(directory, clock=clocks[0]))
        clients, agents = [], []
        for number, clock in enumerate(clocks[1:]):
            agent = await stack.enter_async_context(running_agent(server, directory, f"a{number}", clock=clock))
            agents.append(agent)
            await server.register(agent.agent.node.id.path, f"/wl/{number}")
            clients.append(Client(await stack.enter_async_context(agent.channel()), failures))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        work = [group.create_task(client.follow()) for client in clients]
        await until(lambda: all(one.identities and one.bundles for one in clients), 30)
        for kind in ("x509", "jwt"):
            await everybody_with_everybody(clients)
            stepped.step = way * STEP
            made = await server.authorities.prepare(kind)
            await everybody_with_everybody(clients)
            stepped.step = timedelta()
            (old,) = (one for one in await server.authorities.list(kind) if one.state == 2)
            await server.authorities.activate(kind, made.id)
            await everybody_with_everybody(clients)
            stepped.step = way * STEP
            await server.authorities.taint(kind, old.id)
            if kind == "x509":
                await until(lambda new=made.id: all(one.issuers() == {new} for one in clients), 30)
            else:
                await until(lambda gone=old.id: all(one.agent.cache.is_tainted_kid(gone) for one in agents), 30)
            stepped.step = timedelta()
            await everybody_with_everybody(clients)
            await server.authorities.revoke(kind, old.id)
            await everybody_with_everybody(clients)
        for task in work:
            task.cancel()
    assert failures == []
