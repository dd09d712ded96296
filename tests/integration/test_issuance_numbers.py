"""Serial numbers and token ids of replicas that are killed again and again: none comes twice, and every bit is random; I06.

Scaled for CI. ``BROKER_ISSUANCES=COUNT:KILLS`` has three replicas issue as much, and prints what they did; the line itself is
``1000000:20``.
"""

import asyncio
import json
import os
import time
from collections import Counter
from contextlib import AsyncExitStack

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from broker._proto.service import Stub
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker.server.api.grpc import svid
from broker.server.authority.profile import SERIAL_BITS
from broker.spiffe.jose import b64url_decode
from tests.fakes.replicas import replica
from tests.integration.test_server_identity import attested, create_entry, csr

SCALE = os.environ.get("BROKER_ISSUANCES", "")
ISSUANCES, KILLS = (int(one) for one in SCALE.split(":")) if SCALE else (2000, 1)
NAMES = ("a", "b", "c") if SCALE else ("a", "b")
BATCH, TOKENS = (250, 60) if SCALE else (50, 12)  # certificates in one call, and tokens asked for meanwhile
PATIENCE = 60  # seconds
BYTES = SERIAL_BITS // 8
SIX_SIGMA = 8 * BYTES + 6 * (2 * 8 * BYTES) ** 0.5  # of chi-square with as many degrees of freedom as bits


class Estate:
    """What all replicas issued so far, and which of them serve at this moment."""

    def __init__(self, directory, url):
        self.directory, self.url = directory, url
        self.request = csr(ec.generate_private_key(ec.SECP256R1()))
        self.serials, self.token_ids, self.lives = [], [], Counter()
        self.serving, self.kills, self._is_over = {}, 0, False

    @property
    def count(self):
        return len(self.serials) + len(self.token_ids)

    @property
    def is_over(self):
        """Whether all is done: who was killed last is back, too."""
        self._is_over |= self.count >= ISSUANCES and self.kills == KILLS and len(self.serving) == len(NAMES)
        return self._is_over

    async def keep(self, name):
        """Run one replica and have it issue, again and again; it is killed by others."""
        while not self.is_over:
            async with AsyncExitStack() as stack:
                one = await stack.enter_async_context(
                    replica(self.directory, name, self.url, BROKER_SERVER__RATELIMIT__SIGNING="false")
                )
                try:
                    async with asyncio.timeout(PATIENCE):
                        _, agent_id, channel = await self.joined(stack, one)
                    entry = (await create_entry(one.server, agent_id, f"/{name}/{self.lives[name]}")).entry.id
                    self.lives[name] += 1
                    self.serving[name] = one
                    await self.issue(Stub(channel, svid.BINDING), entry, one.process)
                except* grpc.aio.AioRpcError:
                    assert one.process.returncode is not None
                finally:
                    self.serving.pop(name, None)

    async def joined(self, stack, one):
        """Attest a node, once the replica may sign: it publishes its authority first."""
        while True:
            try:
                return await stack.enter_async_context(attested(one.server))
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.1)

    async def issue(self, stub, entry, process):
        async with asyncio.TaskGroup() as group:
            group.create_task(self.certificates(stub, entry, process))
            group.create_task(self.tokens(stub, entry, process))

    async def answered(self, call, process):
        """Ask again, as agents do, while a replica that lives is busy, or until it is known to have been killed."""
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    return await call()
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.UNAVAILABLE or process.returncode is not None:
                        raise
                await asyncio.sleep(0.1)

    async def certificates(self, stub, entry, process):
        wanted = [svid_pb2.NewX509SVIDParams(entry_id=entry, csr=self.request)] * BATCH
        request = svid_pb2.BatchNewX509SVIDRequest(params=wanted)
        while True:
            answer = await self.answered(lambda: stub.BatchNewX509SVID(request, timeout=PATIENCE), process)
            for one in answer.results:
                assert one.status.code == 0, one.status
                self.serials.append(x509.load_der_x509_certificate(one.svid.cert_chain[0]).serial_number)
            if self.is_over:
                return

    async def tokens(self, stub, entry, process):
        request = svid_pb2.NewJWTSVIDRequest(entry_id=entry, audience=["aud"])
        while True:
            for answer in await asyncio.gather(
                *(self.answered(lambda: stub.NewJWTSVID(request, timeout=PATIENCE), process) for _ in range(TOKENS))
            ):
                claims = json.loads(b64url_decode(answer.svid.token.split(".")[1]))
                self.token_ids.append(claims["jti"])
            if self.is_over:
                return

    async def kill(self):
        """Kill one of them after each share of the whole."""
        for number in range(1, KILLS + 1):
            name = NAMES[number % len(NAMES)]
            while self.count < ISSUANCES * number / (KILLS + 1) or name not in self.serving:
                await asyncio.sleep(0.02)
            self.serving.pop(name).process.kill()
            self.kills += 1


def chi_square(numbers):
    """How far the bits of as many numbers of 16 octets are from being set in half of them each."""
    text, total = b"".join(numbers), 0.0
    for column in range(BYTES):
        seen = Counter(text[column::BYTES])
        for bit in range(8):
            ones = sum(count for octet, count in seen.items() if octet >> bit & 1)
            total += (ones - len(numbers) / 2) ** 2 / (len(numbers) / 4)
    return total


@pytest.mark.timeout(120 + ISSUANCES // 200)
@pytest.mark.bears("I06")
async def test_no_number_comes_twice_whoever_is_killed(directory, postgresql):
    estate, began = Estate(directory, postgresql), time.monotonic()
    async with asyncio.TaskGroup() as group:
        for work in (estate.kill(), *(estate.keep(name) for name in NAMES)):
            group.create_task(work)
    seconds = time.monotonic() - began
    serials = [one.to_bytes(BYTES) for one in estate.serials]
    token_ids = [bytes.fromhex(one) for one in estate.token_ids]
    found = [chi_square(numbers) for numbers in (serials, token_ids)]
    print(
        f"{len(serials)} certificates, {len(token_ids)} tokens in {seconds:.0f} s, lives {dict(estate.lives)}, {found}"
    )
    assert len(set(serials)) == len(serials)
    assert len(set(token_ids)) == len(token_ids)
    assert {len(one) for one in token_ids} == {BYTES}
    assert max(found) < SIX_SIGMA
    assert sum(estate.lives.values()) == len(NAMES) + KILLS


def test_numbers_that_are_not_random_are_seen():
    # A control: a counter in the lowest octet, and one bit that is always set.
    counted = [os.urandom(BYTES - 1) + bytes([number % 64]) for number in range(2000)]
    fixed = [bytes([octet[0] | 1]) + octet[1:] for octet in (os.urandom(BYTES) for _ in range(2000))]
    assert (
        min(chi_square(counted), chi_square(fixed)) > SIX_SIGMA > chi_square([os.urandom(BYTES) for _ in range(2000)])
    )
