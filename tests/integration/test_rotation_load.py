"""Rotation under load: workloads of three agents shake hands and check tokens while authorities come and go.

Scaled for CI. ``BROKER_LOAD=WORKLOADS:SECONDS``, the workloads of all agents together, runs it larger, with the lives and the
rate of reliability line K01 (an authority 60 s, an SVID 20 s, 200 handshakes and token checks a second): ``BROKER_LOAD=51:1200``
is the line itself. Server, agents and workloads share this process and so one core: where that is not enough, the rate and
``lag`` in what it prints say so, and an SVID that had expired is told with the lag of that moment.
"""

import asyncio
import itertools
import os
import shutil
import ssl
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_der_private_key

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import WORKLOAD
from broker.clock import SystemClock
from broker.errors import BrokerError
from broker.spiffe import Bundle, BundleSet
from broker.spiffe.certificates import split_der
from broker.transport.tls import ContextSource, SvidPeer, TlsIdentity, client_context, judge, roots_of, server_context
from tests.fakes.running_agent import HEADER, until
from tests.fakes.small_estate import TD, issuer_key_id, running_agent, running_server

SCALE = os.environ.get("BROKER_LOAD", "")
WORKLOADS, SECONDS = (int(one) for one in SCALE.split(":")) if SCALE else (24, 27)
CA_TTL, SVID_TTL = (timedelta(seconds=60), 20) if SCALE else (timedelta(seconds=24), 8)
FORCE_AFTER = 90 if SCALE else 22  # seconds: in CI after the one rotation that is due by itself
HANDSHAKES, TOKENS = (180, 20) if SCALE else (60, 15)  # a second
AGENTS = 3
EACH = -(-WORKLOADS // AGENTS)  # workloads of one agent
CLOCK = SystemClock()


class Client:
    """The workloads of one agent, as their process knows them: identities, bundle, tokens."""

    def __init__(self, channel, failures):
        self.stub = Stub(channel, WORKLOAD)
        self.failures = failures
        self.identities = {}
        self.bundles = BundleSet.of()
        self.seen = set()  # every authority that signed one of its SVIDs
        self.contexts = {}

    async def follow(self):
        await asyncio.gather(
            self.read("FetchX509SVID", workload_pb2.X509SVIDRequest(), self.take),
            self.read("FetchX509Bundles", workload_pb2.X509BundlesRequest(), self.take_bundle),
        )

    async def read(self, method, request, take):
        try:
            async for message in getattr(self.stub, method)(request, metadata=HEADER):
                take(message)
            self.failures.append(f"{method} ended")
        except grpc.aio.AioRpcError as error:
            self.failures.append(f"{method}: {error.code().name} {error.details()}")

    def take(self, message):
        told = {one.spiffe_id: one for one in message.svids}
        if set(self.identities) - set(told):
            self.failures.append("an SVID was withdrawn")
        for name, svid in told.items():
            chain = tuple(split_der(svid.x509_svid))
            known = self.identities.get(name)
            if known is None or known.chain_der != chain:
                self.identities[name] = TlsIdentity(chain, load_der_private_key(svid.x509_svid_key, None))
                self.seen.add(issuer_key_id(x509.load_der_x509_certificate(chain[0])))

    def take_bundle(self, message):
        self.bundles = BundleSet.of(*(Bundle.from_workload_api(TD, x509_der=der) for der in message.bundles.values()))

    def context(self, name, *, is_server):
        """Give what our dialers and listeners use for a handshake: built anew when identity or bundle are others."""
        source = self.contexts.get((name, is_server))
        if source is None:
            build = client_context if not is_server else partial(server_context, client="required")
            source = self.contexts[name, is_server] = ContextSource(
                lambda: self.identities[name],
                lambda: self.bundles,
                lambda identity, bundles: build(identity, roots_of(bundles), alpn=("h2",)),
            )
        return source()

    def left(self, name):
        """Give the seconds for which an identity's SVID is still valid."""
        leaf = x509.load_der_x509_certificate(self.identities[name].chain_der[0])
        return (leaf.not_valid_after_utc - CLOCK.now()).total_seconds()

    def issuers(self):
        return {issuer_key_id(x509.load_der_x509_certificate(one.chain_der[0])) for one in self.identities.values()}


def shake_hands(client, name, server, peer):
    """One mutual TLS handshake, in memory, judged on both sides as our listeners and dialers do."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (
        client.context(name, is_server=False).wrap_bio(to_client, to_server),
        server.context(peer, is_server=True).wrap_bio(to_server, to_client, server_side=True),
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
        seen = judge(end, who.bundles, CLOCK.now())
        assert isinstance(seen, SvidPeer) and str(seen.svid.id) == expected


async def paced(rate):
    """Give a number so often a second, as far as the machine keeps up; at most the last second is made up for."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    for number in itertools.count():
        yield number
        due = max(due + 1 / rate, loop.time() - 1)
        await asyncio.sleep(max(due - loop.time(), 0))


async def handshakes(clients, pairs, counts, failures):
    async for number in paced(HANDSHAKES):
        client, server = pairs[number % len(pairs)]
        names, peers = sorted(client.identities), sorted(server.identities)
        name, peer = names[number % len(names)], peers[(number * 7) % len(peers)]
        try:
            shake_hands(client, name, server, peer)
            counts["handshakes"] += 1
        except (ssl.SSLError, BrokerError, AssertionError) as error:
            left = f"{client.left(name):.1f} s and {server.left(peer):.1f} s left, lag {counts['lag now, ms']} ms"
            failures.append(f"handshake of {name} with {peer}: {error!r}; {left}")


async def tokens(pairs, counts, failures):
    async for number in paced(TOKENS):
        client, server = pairs[number % len(pairs)]
        name = sorted(client.identities)[number % len(client.identities)]
        request = workload_pb2.JWTSVIDRequest(audience=["aud"], spiffe_id=name)
        try:
            answer = await client.stub.FetchJWTSVID(request, metadata=HEADER, timeout=20)
            check = workload_pb2.ValidateJWTSVIDRequest(audience="aud", svid=answer.svids[0].svid)
            await server.stub.ValidateJWTSVID(check, metadata=HEADER, timeout=20)
            counts["tokens"] += 1
        except grpc.aio.AioRpcError as error:
            failures.append(f"token of {name}: {error.code().name} {error.details()}")


async def watch_lag(counts):
    """Note for how long the loop did nothing for anybody, at worst."""
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        await asyncio.sleep(0.05)
        counts["lag now, ms"] = round((loop.time() - began - 0.05) * 1000)
        counts["lag, ms"] = max(counts["lag, ms"], counts["lag now, ms"])


async def force(server, clients, counts):
    """Prepare, activate, taint, wait until nothing of the old one is in use, revoke."""
    for kind in ("x509", "jwt"):
        made = await server.authorities.prepare(kind)
        await asyncio.sleep(0.5)
        old = next(one for one in await server.authorities.list(kind) if one.state == 2)
        if old.id == made.id:
            continue  # it was due by itself in the meantime
        await server.authorities.activate(kind, made.id)
        await server.authorities.taint(kind, old.id)
        began = time.monotonic()
        if kind == "x509":
            await until(lambda gone=old.id: all(gone not in client.issuers() for client in clients), 20)
        else:
            await asyncio.sleep(1)
        counts[f"{kind} replaced, ms"] = round((time.monotonic() - began) * 1000)
        await server.authorities.revoke(kind, old.id)
        counts[f"{kind} forced"] += 1


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.bears("K01", "K04", "WA-03", "WA-15")
async def test_no_handshake_fails_and_no_stream_ends_while_authorities_come_and_go():
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    failures, counts = [], Counter()
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        server = await stack.enter_async_context(
            running_server(directory, ca_ttl=CA_TTL, agent_ttl=timedelta(seconds=SVID_TTL * 2))
        )
        clients = []
        for number in range(AGENTS):
            agent = await stack.enter_async_context(running_agent(server, directory, f"agent{number}"))
            for one in range(EACH):
                path = f"/wl/{number}/{one}"
                await server.register(agent.agent.node.id.path, path, x509_svid_ttl=SVID_TTL, jwt_svid_ttl=SVID_TTL)
            clients.append(Client(await stack.enter_async_context(agent.channel()), failures))
        group = await stack.enter_async_context(asyncio.TaskGroup())
        work = [group.create_task(client.follow()) for client in clients]
        await until(lambda: all(len(one.identities) == EACH and one.bundles for one in clients), 30)
        pairs = list(itertools.product(clients, clients))
        work.append(group.create_task(handshakes(clients, pairs, counts, failures)))
        work.append(group.create_task(tokens(pairs, counts, failures)))
        work.append(group.create_task(watch_lag(counts)))
        began, forced_at = time.monotonic(), FORCE_AFTER
        while (passed := time.monotonic() - began) < SECONDS and not failures:
            if passed > forced_at:
                await force(server, clients, counts)
                forced_at += FORCE_AFTER
            await asyncio.sleep(0.2)
        for task in work:
            task.cancel()
    seen = set.union(*(client.seen for client in clients))
    print(
        dict(counts), f"authorities={len(seen)}", f"a second: {(counts['handshakes'] + counts['tokens']) / SECONDS:.0f}"
    )
    assert failures == []
    assert len(seen) >= 3
    assert counts["x509 forced"] >= 1
    assert min(counts["handshakes"], counts["tokens"]) >= 50
