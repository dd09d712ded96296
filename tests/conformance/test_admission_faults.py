"""Nodes that come twice, with another's proof, or at another's cost: join tokens and challenges; I11 and I12."""

import asyncio
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from broker._proto.service import Stub
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import attestation_pb2
from broker._proto.spire.api.types.x509svid_pb2 import X509SVID
from broker.attestation.possession import answer, chain_message
from broker.server.api.grpc import agent
from broker.server.app import Server, server
from broker.server.authority import plan
from broker.server.settings import AttestorSettings
from broker.spiffe.chains import MAX_SIGNATURES
from tests.conformance.house import SECONDS
from tests.fakes.costs import Costs
from tests.fakes.node_pki import Certified, root, rsa_key
from tests.fakes.node_pki import certified as certified_by
from tests.integration.identity_rig import (
    Estate,
    Node,
    attest_over,
    attestation,
    csr,
    error_of,
    join_token,
    own_bundle,
    running,
)
from tests.unit.transport.clocks import HandClock

DENIED = grpc.StatusCode.PERMISSION_DENIED
USED_UP = grpc.StatusCode.INVALID_ARGUMENT
"""Of a join token that is unknown, used or expired, as in SPIRE."""
REPLICAS = {"sqlite": 1, "postgresql": 3}
"""Servers over one store: an SQLite file has one."""
CONCURRENT, CONNECTIONS = 50, 3
ROUNDS = int(os.environ.get("BROKER_TOKEN_ROUNDS", "10"))
"""Of the line's 200."""


@pytest.fixture
def estate() -> Iterator[Estate]:
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    yield Estate(directory)
    shutil.rmtree(directory)


Outcome = X509SVID | grpc.StatusCode


async def said(call: Any, request: agent_pb2.AttestAgentRequest) -> Outcome:
    """Send the last word of an attestation; give the SVID, or the status of the refusal."""
    try:
        await call.write(request)
        response = await call.read()
    except grpc.aio.AioRpcError as error:
        return error.code()
    if response is grpc.aio.EOF:
        code: grpc.StatusCode = (await error_of(call)).code()
        return code
    svid: X509SVID = response.result.svid
    assert svid.cert_chain, "a challenge where none was due"
    return svid


async def outcome(channel: grpc.aio.Channel, request: agent_pb2.AttestAgentRequest) -> Outcome:
    """Attest by one message."""
    return await said(Stub(channel, agent.BINDING).AttestAgent(timeout=SECONDS), request)


@pytest.fixture(params=REPLICAS)
def estates(request: pytest.FixtureRequest) -> Iterator[list[Estate]]:
    """The places of as many servers as the kind of store takes, all of one store."""
    kind: str = request.param
    url = request.getfixturevalue("postgresql") if kind == "postgresql" else ""
    directories = [Path(tempfile.mkdtemp(prefix="broker", dir="/tmp")) for _ in range(REPLICAS[kind])]
    yield [Estate(directory, store_url=url) for directory in directories]
    for directory in directories:
        shutil.rmtree(directory)


@pytest.mark.timeout(60 + 2 * ROUNDS)
@pytest.mark.bears("I11")
async def test_one_token_admits_one_node_each_round(estates: list[Estate], monkeypatch: pytest.MonkeyPatch) -> None:
    # A replica that joins waits until everybody has its authority: here nobody else verifies anything by it.
    monkeypatch.setattr(plan, "AHEAD", timedelta(milliseconds=100))
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(running(one)) for one in estates]
        nodes = [Node(await own_bundle(one)) for one in replicas]
        pairs = list(zip(replicas, nodes, strict=True)) * CONNECTIONS
        channels = [await stack.enter_async_context(node.dial(one.port)) for one, node in pairs]
        for number in range(ROUNDS):
            token = await join_token(replicas[number % len(replicas)])
            request = attestation(token, csr(nodes[0].key))
            outcomes = await asyncio.gather(
                *(outcome(channels[turn % len(channels)], request) for turn in range(CONCURRENT))
            )
            admitted = [svid for svid in outcomes if isinstance(svid, X509SVID)]
            assert len(admitted) == 1
            assert {code for code in outcomes if not isinstance(code, X509SVID)} == {USED_UP}


@pytest.mark.bears("I11")
async def test_a_token_is_its_exact_text(estate: Estate) -> None:
    async with running(estate) as one:
        token, another = await join_token(one), await join_token(one)
        node = Node(await own_bundle(one))
        wrong = [
            token.upper(), token[: len(token) // 2], token[:-1], token[1:], token + "\x00", token + "\x00more", token + "0",
            f" {token}", f"{token} ", f"{token}\n", token.swapcase(), token[::-1], f"{token}{another}", "\x00" + token, "%",
            "", "_" * len(token), token[:-1] + "\u212a", token.replace(token[0], token[0] + "\u200b", 1),
        ]  # fmt: skip
        async with node.dial(one.port) as channel:
            for text in wrong:
                assert await outcome(channel, attestation(text, csr(node.key))) is USED_UP, text
            for kind in ("JOIN_TOKEN", "join_token ", "join-token", "", "unix", "../join_token"):
                request = attestation(token, csr(node.key))
                request.params.data.type = kind
                wanted = grpc.StatusCode.FAILED_PRECONDITION if kind else grpc.StatusCode.INVALID_ARGUMENT
                assert await outcome(channel, request) is wanted, kind
            # None of that used it up, and the right text works once.
            assert isinstance(await outcome(channel, attestation(token, csr(node.key))), X509SVID)
            assert await outcome(channel, attestation(token, csr(node.key))) is USED_UP
            # A request that is refused for its CSR does not use up a token either.
            assert await outcome(channel, attestation(another, b"x")) is grpc.StatusCode.INVALID_ARGUMENT
            assert isinstance(await attest_over(channel, another, csr(node.key)), X509SVID)


@pytest.mark.bears("I11")
async def test_a_token_that_has_expired(estate: Estate) -> None:
    clock = HandClock()
    async with server(estate.settings(), clock=clock, environ={}) as one:
        short, long = await join_token(one, ttl=60), await join_token(one, ttl=3000)
        node = Node(await own_bundle(one))
        async with node.dial(one.port) as channel:
            clock.step = timedelta(seconds=61)
            assert await outcome(channel, attestation(short, csr(node.key))) is USED_UP
            assert isinstance(await outcome(channel, attestation(long, csr(node.key))), X509SVID)
            # A clock that goes back brings no token back.
            clock.step = timedelta(seconds=0)
            assert await outcome(channel, attestation(long, csr(node.key))) is USED_UP


# --- challenges ---------------------------------------------------------------------------------------------------


@asynccontextmanager
async def certified(estate: Estate, authority: Certified) -> AsyncIterator[Server]:
    """A server that takes certificates of this authority."""
    file = estate.directory / "ca.pem"
    file.write_bytes(authority.pem)
    attestors = AttestorSettings(node={"join_token": {}, "x509pop": {"ca_bundle_path": str(file)}})
    async with running(estate, attestors=attestors) as one:
        yield one


def evidence(payload: bytes, key: Any) -> agent_pb2.AttestAgentRequest:
    return agent_pb2.AttestAgentRequest(
        params=agent_pb2.AttestAgentRequest.Params(
            data=attestation_pb2.AttestationData(type="x509pop", payload=payload),
            params=agent_pb2.AgentX509SVIDParams(csr=csr(key)),
        )
    )


class Attempt:
    """One attestation by certificate, step by step."""

    def __init__(self, channel: grpc.aio.Channel, node: Certified, key: Any) -> None:
        self.call = Stub(channel, agent.BINDING).AttestAgent(timeout=SECONDS)
        self.node, self.key = node, key

    async def challenge(self) -> bytes:
        await self.call.write(evidence(chain_message([self.node.der]), self.key))
        challenge: bytes = (await self.call.read()).challenge
        return challenge

    async def respond(self, response: bytes) -> Outcome:
        return await said(self.call, agent_pb2.AttestAgentRequest(challenge_response=response))


@pytest.mark.bears("I12")
async def test_an_answer_fits_its_own_challenge_only(estate: Estate) -> None:
    authority = root()
    node, stranger = authority.node(), authority.node("other")
    async with certified(estate, authority) as one:
        me = Node(await own_bundle(one))
        async with me.dial(one.port) as channel:
            first, second = Attempt(channel, node, me.key), Attempt(channel, node, me.key)
            asked, asked_again = await first.challenge(), await second.challenge()
            assert asked != asked_again
            right = answer(node.key, asked)
            # Another session's answer, given at the same time.
            assert await second.respond(right) is DENIED
            assert isinstance(await first.respond(right), X509SVID)
            # The same answer once more, later.
            third = Attempt(channel, node, me.key)
            await third.challenge()
            assert await third.respond(right) is DENIED
            # Another's key, nothing at all, the challenge itself.
            for wrong in (
                lambda asked: answer(stranger.key, asked),
                lambda _: b"",
                lambda asked: asked,
                lambda _: b"{}",
            ):
                attempt = Attempt(channel, node, me.key)
                assert await attempt.respond(wrong(await attempt.challenge())) is DENIED


@pytest.mark.bears("I10", "I12")
async def test_evidence_with_two_copies(estate: Estate) -> None:
    authority = root()
    node, stranger = authority.node(), root("stranger").node()
    chains = [json.loads(chain_message([one.der]))["certificates"][0] for one in (node, stranger)]
    twice = f'{{"certificates":["{chains[0]}"],"certificates":["{chains[1]}"]}}'
    folded = f'{{"certificates":["{chains[0]}"],"Certificates":["{chains[1]}"]}}'
    async with certified(estate, authority) as one:
        me = Node(await own_bundle(one))
        async with me.dial(one.port) as channel:
            for payload in (twice, folded):
                assert await outcome(channel, evidence(payload.encode(), me.key)) is DENIED
            # A leaf among the intermediates: the first is who comes, the second vouches for nobody.
            both = chain_message([node.der, authority.node("second").der])
            assert await outcome(channel, evidence(both, me.key)) is DENIED


@dataclass(frozen=True)
class HugeKey:
    """The public half of an RSA key of any size: nobody needs the private one to send a certificate."""

    bits: int

    def public_key(self) -> rsa.RSAPublicKey:
        modulus = secrets.randbits(self.bits) | 1 | 1 << (self.bits - 1)
        return rsa.RSAPublicNumbers(65537, modulus).public_key()


def huge(made: Callable[..., Certified]) -> Certified:
    return made("huge", key=HugeKey(16384))


@pytest.mark.bears("I12")
async def test_what_costs_much_is_refused_before_it_costs(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    authority = root()
    node = authority.node()
    # What is done with each before it is refused: what a certificate holds is not known unread. None is verified.
    parsed, read, nothing = partial(Costs, json=1), Costs(json=1), Costs()
    payloads = {
        "a thousand certificates": (nothing, chain_message([node.der, *[authority.der] * 1000])),
        "thousands that are small": (read, json.dumps({"certificates": ["AA=="] * 8000}).encode()),
        "six certificates": (read, chain_message([node.der, *[authority.der] * 5])),
        "RSA of 16384 bits": (parsed(certificates=1), chain_message([huge(authority.node).der])),
        "an intermediate of 16384 bits": (
            parsed(certificates=2),
            chain_message([node.der, huge(authority.authority).der]),
        ),
        "deep": (nothing, b"[" * 30_000 + b"]" * 30_000),
        "long": (read, b'{"certificates":["' + b"A" * 60_000 + b'"]}'),
        "random": (nothing, secrets.token_bytes(60_000)),
    }
    async with certified(estate, authority) as one:
        me = Node(await own_bundle(one))
        async with me.dial(one.port) as channel:
            await outcome(channel, evidence(b"", me.key))  # the client has judged the server by now
            for name, (allowed, payload) in payloads.items():
                costs = Costs.of(payload, monkeypatch)
                assert await outcome(channel, evidence(payload, me.key)) in {
                    DENIED, grpc.StatusCode.INVALID_ARGUMENT,
                }, name  # fmt: skip
                assert costs == allowed, name
            # A control: an honest node costs one.
            costs = Costs.of(chain_message([node.der]), monkeypatch)
            attempt = Attempt(channel, node, me.key)
            assert isinstance(await attempt.respond(answer(node.key, await attempt.challenge())), X509SVID)
            assert (costs.json, costs.signatures) == (1, 1)
            assert costs.certificates > 0


@pytest.mark.bears("I12")
async def test_a_maze_of_authorities_has_a_budget(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    # Authorities of one name and key that all vouch for each other, and nobody trusted for any of them.
    authority, stranger = root(), root("stranger")
    key = rsa_key()
    first = stranger.authority("maze", key=key)
    maze = [certified_by("maze", key, first, authority=True) for _ in range(4)]
    leaf = first.node()
    async with certified(estate, authority) as one:
        me = Node(await own_bundle(one))
        async with me.dial(one.port) as channel:
            await outcome(channel, evidence(b"", me.key))  # the client has judged the server by now
            payload = chain_message([leaf.der, *(one.der for one in maze)])
            costs = Costs.of(payload, monkeypatch)
            assert await outcome(channel, evidence(payload, me.key)) is DENIED
            assert costs.signatures == MAX_SIGNATURES + 1  # the last one is refused
