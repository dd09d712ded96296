"""Workloads of one agent in a process of their own: mutual TLS with those of every agent, and tokens for these to check.

    python -m tests.fakes.loaded_workloads AGENT_SOCKET DIRECTORY NUMBER AGENTS EACH HANDSHAKES TOKENS

It holds the identities ``/wl/NUMBER/0`` … of its agent and serves each on a socket below DIRECTORY, by the SDK's own contexts. A
line on standard input has it call the workloads of all AGENTS, EACH apiece, so often a second; the next one has it begin no more
calls; the end of the input ends it. It prints what it holds, did and saw fail, as a line of JSON, again and again.
"""

import asyncio
import itertools
import json
import ssl
import sys
import time
from collections import Counter
from pathlib import Path

import grpc
from cryptography import x509

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import WORKLOAD
from broker.clock import SystemClock
from broker.errors import BrokerError, Refused
from broker.sdk.tls import client_context, require_peer, server_context
from broker.sdk.workload import read_identity
from broker.spiffe import Bundle, BundleSet, SpiffeId
from tests.fakes.running_agent import HEADER
from tests.fakes.small_estate import TD, issuer_key_id

SOURCES = Path(__file__).resolve().parents[2]
TELL_EVERY = 0.2  # seconds
PATIENCE = 20  # seconds: for a call, and for what is under way at the end
TOLD = 10  # failures: the first ones say it
CLOCK = SystemClock()


class Held:
    """One identity of a process that has several, as the SDK's contexts want to see a workload."""

    def __init__(self, client):
        self.client = client
        self.current = None

    @property
    def bundles(self):
        return self.client.bundles

    @property
    def leaf(self):
        return x509.load_der_x509_certificate(self.current.tls.chain_der[0])


class Client:
    """The workloads of one agent, as their process knows them: identities by name, and the bundle."""

    def __init__(self, channel, failures):
        self.stub = Stub(channel, WORKLOAD)
        self.failures = failures
        self.identities = {}
        self.bundles = BundleSet.of()
        self.seen = set()  # every authority that signed one of its SVIDs
        self.known = {}  # since when an authority is in the bundle, by the steady clock
        self.ahead = float("inf")  # seconds that one was in the bundle before its first signature came, at least
        self.client_contexts, self.server_contexts = {}, {}  # by name

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
            held = self.identities.setdefault(name, Held(self))
            if held.current is None or b"".join(held.current.tls.chain_der) != svid.x509_svid:
                held.current = read_identity(svid)
                self.signed_by(issuer_key_id(held.leaf))

    def signed_by(self, authority):
        if self.seen and authority not in self.seen:  # with the first ones everything comes at once
            self.ahead = min(self.ahead, time.monotonic() - self.known.get(authority, time.monotonic()))
        self.seen.add(authority)

    def take_bundle(self, message):
        self.bundles = BundleSet.of(*(Bundle.from_workload_api(TD, x509_der=der) for der in message.bundles.values()))
        for authority in self.bundles[TD].x509_authorities:
            named = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
            self.known.setdefault(named.key_identifier.hex(), time.monotonic())

    def client_context(self, name):
        """Give what a handshake begins with: the SDK builds it anew when identity or bundle are others."""
        if name not in self.client_contexts:
            self.client_contexts[name] = client_context(self.identities[name], check_hostname=False)
        return self.client_contexts[name]

    def server_context(self, name):
        """Give what a listener begins with, for all its time."""
        if name not in self.server_contexts:
            self.server_contexts[name] = server_context(self.identities[name])
        return self.server_contexts[name]

    def left(self, name):
        """Give the seconds for which an identity's SVID is still valid."""
        return (self.identities[name].leaf.not_valid_after_utc - CLOCK.now()).total_seconds()

    def issuers(self):
        return {issuer_key_id(one.leaf) for one in self.identities.values()}


def name_of(number, one):
    return f"spiffe://{TD.name}/wl/{number}/{one}"


async def paced(rate):
    """Give a number so often a second; at most the last half minute is made up for, where the machine does not keep up."""
    loop = asyncio.get_running_loop()
    due = loop.time()
    for number in itertools.count():
        yield number
        due = max(due + 1 / rate, loop.time() - 30)
        await asyncio.sleep(max(due - loop.time(), 0))


async def watch_lag(counts):
    """Note for how long the loop did nothing for anybody: in the last moment, and at worst."""
    loop = asyncio.get_running_loop()
    while True:
        began = loop.time()
        await asyncio.sleep(0.05)
        counts["lag now, ms"] = round((loop.time() - began - 0.05) * 1000)
        counts["lag, ms"] = max(counts["lag, ms"], counts["lag now, ms"])


class Process:
    """What this process serves and calls."""

    def __init__(self, client, directory, number, agents, each):
        self.client, self.directory, self.number = client, Path(directory), number
        self.peers = list(itertools.product(range(agents), range(each)))
        self.everybody = {SpiffeId(name_of(*one)) for one in self.peers}
        self.failures, self.counts = client.failures, Counter()
        self.least = float("inf")  # seconds of validity that an SVID in use ever had left
        self.calling, self.is_over = 0, False

    def failed(self, what, error, name):
        left, lag = self.client.left(name), self.counts["lag now, ms"]
        self.failures.append(f"{what}: {error!r}; {name} has {left:.1f} s left, lag {lag} ms")

    async def serve(self):
        """Serve each identity on a socket of its own."""
        for one in range(len(self.client.identities)):
            name = name_of(self.number, one)
            await asyncio.start_unix_server(
                lambda reader, writer, name=name: self.answer(name, reader, writer),
                self.directory / f"{self.number}.{one}",
                ssl=self.client.server_context(name),
                backlog=1000,
            )

    async def answer(self, name, reader, writer):
        """Say to the caller who it is; check the token that it may bring at this workload's own agent."""
        try:
            caller = require_peer(writer.get_extra_info("ssl_object"), self.client.bundles, self.everybody).id
            async with asyncio.timeout(PATIENCE):
                token = (await reader.readline()).decode().strip()
            if token:
                check = workload_pb2.ValidateJWTSVIDRequest(audience="aud", svid=token)
                checked = await self.client.stub.ValidateJWTSVID(check, metadata=HEADER, timeout=PATIENCE)
                if checked.spiffe_id != str(caller):
                    raise Refused(f"{caller} brought a token of {checked.spiffe_id}", code="other_subject")
            writer.write(f"{caller}\n".encode())
        except (OSError, BrokerError, grpc.aio.AioRpcError) as error:
            self.failed("served", error, name)
        finally:
            writer.close()

    async def call(self, kind, number):
        """Have one identity call one of anybody's, with a token or without."""
        names = sorted(self.client.identities)
        name, (agent, one) = names[number % len(names)], self.peers[(number * 7) % len(self.peers)]
        peer = name_of(agent, one)
        try:
            async with asyncio.timeout(PATIENCE):
                token = await self.token(name) if kind == "tokens" else ""
                reader, writer = await asyncio.open_unix_connection(
                    self.directory / f"{agent}.{one}", ssl=self.client.client_context(name), server_hostname=""
                )
                try:
                    require_peer(writer.get_extra_info("ssl_object"), self.client.bundles, {SpiffeId(peer)})
                    writer.write(f"{token}\n".encode())
                    heard = (await reader.readline()).decode().strip()
                finally:
                    writer.close()
            if heard != name:
                raise Refused(f"{peer} took {name} for {heard!r}", code="other_name")
            self.counts[kind] += 1
        except (OSError, ssl.SSLError, TimeoutError, BrokerError, grpc.aio.AioRpcError) as error:
            self.failed(f"{kind}, {name} to {peer}", error, name)

    async def token(self, name):
        request = workload_pb2.JWTSVIDRequest(audience=["aud"], spiffe_id=name)
        answer = await self.client.stub.FetchJWTSVID(request, metadata=HEADER, timeout=PATIENCE)
        return answer.svids[0].svid

    async def load(self, kind, rate):
        """Begin so many calls a second, whether the ones before have ended or not."""
        self.calling += 1
        async with asyncio.TaskGroup() as group:
            async for number in paced(rate):
                if self.is_over:
                    break
                group.create_task(self.call(kind, number))
        self.calling -= 1

    async def watch(self):
        """Note how little time an SVID in use had left, at worst."""
        while True:
            await asyncio.sleep(0.1)
            self.least = min([self.least, *map(self.client.left, self.client.identities)])

    def tell(self):
        told = {
            "held": len(self.client.identities) if self.client.bundles else 0,
            "issuers": sorted(self.client.issuers()),
            "seen": sorted(self.client.seen),
            "counts": self.counts,
            "least left": self.least,
            "ahead": self.client.ahead,
            "failures": self.failures[:TOLD],
            "is over": self.is_over and not self.calling,
        }
        print(json.dumps(told), flush=True)


async def read_lines():
    """Give the lines of the standard input."""
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async for line in reader:
        yield line


async def tell_always(process):
    while True:
        process.tell()
        await asyncio.sleep(TELL_EVERY)


async def main():
    socket, directory = sys.argv[1:3]
    number, agents, each, handshakes, tokens = map(int, sys.argv[3:])
    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(f"unix:{socket}", options=options) as channel, asyncio.TaskGroup() as group:
        client = Client(channel, [])
        process = Process(client, directory, number, agents, each)
        work = [group.create_task(client.follow())]
        async with asyncio.timeout(PATIENCE + 10):
            while len(client.identities) < each or not client.bundles:
                await asyncio.sleep(0.02)
        await process.serve()
        others = process.watch(), watch_lag(process.counts), tell_always(process)
        work += [group.create_task(one) for one in others]
        lines = read_lines()
        if await anext(lines, None) is not None:
            work += [group.create_task(process.load(*one)) for one in (("handshakes", handshakes), ("tokens", tokens))]
        async for _ in lines:
            process.is_over = True
        for task in work:
            task.cancel()


if __name__ == "__main__":
    asyncio.run(main())
