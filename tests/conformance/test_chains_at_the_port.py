"""Chains through a real TLS handshake: unordered, with more than is needed, resumed, and under authorities that go; I02, I08, I09."""

import asyncio
import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509

from broker._proto.service import Stub
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker.clock import SystemClock
from broker.errors import InvalidSvid, Misconfigured
from broker.server.api.grpc import agent, entry
from broker.server.app import server
from broker.server.authority import rotation
from broker.server.store.sqlite import SqliteStore
from broker.spiffe import Bundle, BundleSet, TrustDomain, verify_x509_svid
from broker.transport.tls import TlsIdentity, client_context, roots_of, server_context
from tests.conformance import limbo
from tests.conformance.house import SECONDS, House, Replica
from tests.conformance.rekeyed import CannotBeMade, rekeyed
from tests.fakes.svid_pki import Holder, Pki
from tests.integration.identity_rig import (
    Estate,
    Node,
    admin_channel,
    attested,
    id_message,
    own_bundle,
    running,
)
from tests.integration.test_tls_port import Port
from tests.integration.test_tls_port import port as tls_port
from tests.unit.transport.clocks import HandClock


@pytest.fixture
def estate() -> Iterator[Estate]:
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    yield Estate(directory)
    shutil.rmtree(directory)


# --- chains -------------------------------------------------------------------------------------------------------


class Chains:
    """Chains of the other replica's authority, good and bad, by name."""

    def __init__(self, house: House) -> None:
        self.house, self.pki, self.root = house, house.replica.pki, house.replica.root
        self.middle = self.pki.intermediate(self.root, "middle")
        self.lower = self.pki.intermediate(self.middle, "lower")

    def leaf(self, issuer: Holder, **changes: Any) -> Holder:
        return self.house.replica.leaf(issuer=issuer, **changes)

    def stack(self, height: int) -> list[Holder]:
        """A leaf below so many intermediates, itself first."""
        above = [self.root]
        for number in range(height):
            above.append(self.pki.intermediate(above[-1], f"level {number}"))
        return [self.leaf(above[-1]), *reversed(above[1:])]

    def good(self) -> dict[str, list[Holder]]:
        leaf, other = self.leaf(self.lower), self.pki.root("unrelated")
        again = self.pki.intermediate(self.root, "middle", key=self.middle.key)
        p384, rsa = self.pki.key("P-384"), self.pki.key("RSA-2048")
        return {
            "in order": [leaf, self.lower, self.middle],
            "in another order": [leaf, self.middle, self.lower],
            "with the root": [leaf, self.lower, self.middle, self.root],
            "one of them twice": [leaf, self.lower, self.lower, self.middle],
            "with an unrelated authority": [leaf, other, self.lower, self.middle],
            "with two of one name and key": [leaf, again, self.lower, self.middle],
            "seven above the leaf": self.stack(7),
            "P-384 below P-384": [self.leaf(upper := self.pki.intermediate(self.root, "p384", key=p384)), upper],
            "RSA": [self.leaf(self.root, key=rsa)],
            "an RSA authority": [self.leaf(upper := self.pki.intermediate(self.root, "rsa", key=rsa)), upper],
        }  # fmt: skip

    def bad(self) -> dict[str, list[Holder]]:
        expired = self.pki.intermediate(self.root, "expired", start=timedelta(hours=-2), end=timedelta(hours=-1))
        early = self.pki.intermediate(self.root, "early", start=timedelta(hours=1), end=timedelta(hours=2))
        flat = self.pki.intermediate(self.root, "flat", path_length=0)
        below = self.pki.intermediate(flat, "below")
        selfmade = self.leaf(self.pki.root("another replica"))
        impostor = self.pki.intermediate(self.root, "middle")
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
        odd = self.pki.intermediate(self.root, "odd", extra=[(unknown, True)])
        weak, small = self.pki.key("RSA-1024"), self.pki.key("P-192")
        narrow = self.pki.intermediate(self.root, "narrow", purposes=[x509.ObjectIdentifier("1.3.6.1.5.5.7.3.4")])
        other = x509.NameConstraints([x509.UniformResourceIdentifier("other.test")], None)
        bound = self.pki.intermediate(self.root, "bound", extra=[(other, True)])
        foreign = [x509.UniformResourceIdentifier("spiffe://other.test/x")]
        return {
            "one is missing": [self.leaf(self.lower), self.middle],
            "none but the leaf": [self.leaf(self.lower)],
            "another's leaf first": [self.leaf(self.pki.root("stranger")), self.leaf(self.root)],
            "eight above the leaf": self.stack(8),
            "an authority that has expired": [self.leaf(expired), expired],
            "an authority that is not valid yet": [self.leaf(early), early],
            "longer than allowed": [self.leaf(below), below, flat],
            "a root of the right name": [selfmade],
            "an issuer of the right name and another key": [self.leaf(impostor), self.middle],
            "an authority with a critical extension of its own": [self.leaf(odd), odd],
            "a leaf with a critical extension of its own": [self.leaf(self.root, extra=[(unknown, True)])],
            "a leaf that signs for a leaf": [self.leaf(mine := self.leaf(self.root)), mine],
            "a short RSA key": [self.leaf(self.root, key=weak)],
            "an authority with a short key": [self.leaf(up := self.pki.intermediate(self.root, "w", key=weak)), up],
            "a small curve": [self.leaf(self.root, key=small)],
            "an authority for other purposes": [self.leaf(narrow), narrow],
            "an authority that is bound to another domain": [self.leaf(bound), bound],
            "an authority of another trust domain": [self.leaf(up := self.pki.intermediate(self.root, "f", sans=[x509.UniformResourceIdentifier("spiffe://other.test/x")])), up],
            "another trust domain": [self.leaf(self.root, sans=foreign)],
            "an authority alone": [self.middle],
            "the root alone": [self.root],
        }  # fmt: skip


def ours(house: House, chain: list[Holder]) -> str:
    try:
        verify_x509_svid([one.der for one in chain], house.bundles, now=SystemClock().now())
    except InvalidSvid as error:
        return error.reason
    return ""


def port(house: House, chain: list[Holder]) -> bool:
    try:
        return house.present(*chain).status == 200
    except Misconfigured:
        return False  # OpenSSL does not even load it to present it


@pytest.mark.bears("I02")
def test_chains_that_are_good_in_any_order(house: House) -> None:
    chains = Chains(house).good()
    assert {name: ours(house, chain) for name, chain in chains.items()} == dict.fromkeys(chains, "")
    assert {name: port(house, chain) for name, chain in chains.items()} == dict.fromkeys(chains, True)


@pytest.mark.bears("I02")
def test_chains_that_nobody_vouches_for(house: House) -> None:
    chains = Chains(house).bad()
    assert [name for name, chain in chains.items() if ours(house, chain) == ""] == []
    assert [name for name, chain in chains.items() if port(house, chain)] == []


# Where our chain layer accepts and the handshake does not: OpenSSL was asked first, and is stricter.
OPENSSL_STRICTER = {
    "rfc5280::nc::nc-forbids-alternate-chain-ica": "it takes the first issuer that fits and does not go back",
    "rfc5280::nc::nc-forbids-same-chain-ica": "the same",
    "webpki::eku::root-has-eku": "it asks an anchor for its purposes, too",
}
# Where the original is refused for something that the builder does not write.
NOT_COPIED = {
    "webpki::explicit-curve": "curves have names here",
    "webpki::v1-cert": "every certificate is of version 3",
}
# The others cannot be written again: unreadable, malformed, about one moment, or with keys that TLS does not load.
FEWEST_MADE = 180


@pytest.mark.bears("I02", "I13")
@pytest.mark.timeout(180)
@pytest.mark.skipif(not limbo.FOLDER.is_dir(), reason=limbo.REASON)
@pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")
async def test_limbo_through_handshakes(estate: Estate) -> None:
    made, looser, stricter, changed = 0, set(), set(), set()
    async with tls_port(estate.directory) as one:
        for case in limbo.cases():
            try:
                chain = rekeyed(case, "spiffe://limbo.test/web", SystemClock().now().replace(microsecond=0))
                ders = tuple(holder.der for holder in (chain.leaf, *chain.others))
                one.bundles = BundleSet.of(Bundle(TrustDomain("limbo.test"), tuple(chain.anchors)))
                through = await presented(one, TlsIdentity(ders, chain.leaf.key))
            except (CannotBeMade, Misconfigured):
                continue
            made += 1
            verdict = judged(ders, one.bundles)
            if through != verdict:
                (looser if through else stricter).add(case.id)
            if verdict != limbo.chain_verdict(case):
                changed.add(case.id)
    assert looser == set()
    assert stricter == set(OPENSSL_STRICTER)
    assert changed == set(NOT_COPIED)
    assert made >= FEWEST_MADE


async def presented(one: Port, identity: TlsIdentity) -> bool:
    try:
        status, _ = await one.get(identity, "http/1.1")
    except (ssl.SSLError, ConnectionError):
        return False
    return status == 200


def judged(ders: tuple[bytes, ...], bundles: BundleSet) -> bool:
    try:
        verify_x509_svid(ders, bundles, now=SystemClock().now())
    except InvalidSvid:
        return False
    return True


# --- sessions and authorities that are over -----------------------------------------------------------------------


class Client:
    """One TLS client that keeps its session for the next connection."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        self.port, self.context = port, context
        self.session: ssl.SSLSession | None = None

    async def get(self) -> tuple[int, bool]:
        """Ask once; give the status (0: no answer) and whether the session was resumed."""
        return await asyncio.to_thread(self._get)

    def _get(self) -> tuple[int, bool]:
        with socket.create_connection(("127.0.0.1", self.port), timeout=SECONDS) as plain:
            try:
                with self.context.wrap_socket(plain, session=self.session) as secure:
                    secure.sendall(b"GET /keys HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
                    said = b""
                    while piece := secure.recv(4096):
                        said += piece
                    self.session = secure.session or self.session
                    return int(said.split()[1]) if said else 0, bool(secure.session_reused)
            except (ssl.SSLError, ConnectionError):
                return 0, False


@pytest.mark.bears("I08")
async def test_no_session_is_resumed(house: House) -> None:
    leaf = house.replica.leaf()
    client = Client(house.port, client_context(TlsIdentity((leaf.der,), leaf.key), house.roots))
    client.context.options &= ~ssl.OP_NO_TICKET  # a client that would like to
    for _ in range(3):
        assert await client.get() == (200, False)
        assert client.session is None or not client.session.has_ticket
    # Older TLS, where sessions have names, is not spoken.
    client.context.minimum_version = ssl.TLSVersion.TLSv1_2
    client.context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert await client.get() == (0, False)


async def test_a_server_with_tickets_would_be_resumed(house: House) -> None:
    # A control: the same client, before a server that hands out tickets and asks no more.
    leaf = house.replica.leaf()
    context = server_context(TlsIdentity((leaf.der,), leaf.key), house.roots, alpn=("http/1.1",))
    context.options &= ~ssl.OP_NO_TICKET
    context.num_tickets = 2

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context) as listening:
        client = Client(listening.sockets[0].getsockname()[1], client_context(None, house.roots))
        client.context.options &= ~ssl.OP_NO_TICKET
        assert await client.get() == (200, False)
        assert await client.get() == (200, True)


@pytest.mark.bears("I08")
async def test_a_session_from_before_the_ban_is_worth_nothing(estate: Estate) -> None:
    async with running(estate) as one, attested(one) as (node, agent_id, channel):
        identity = node.identity()
        assert identity is not None
        client = Client(one.port, client_context(identity, roots_of(node.trusted)))
        assert await client.get() == (200, False)
        asked = entry_pb2.GetAuthorizedEntriesRequest()
        await Stub(channel, entry.BINDING).GetAuthorizedEntries(asked, timeout=SECONDS)
        async with admin_channel(one) as admin:
            await Stub(admin, agent.BINDING).BanAgent(agent_pb2.BanAgentRequest(id=id_message(agent_id)))
        # The handshake is a full one, and every call is judged anew.
        assert (await client.get())[1] is False
        async with node.dial(one.port) as again:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await Stub(again, entry.BINDING).GetAuthorizedEntries(asked, timeout=SECONDS)
        assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.bears("I08", "I09")
async def test_an_authority_that_goes_takes_its_connections_along(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "CHECK_EVERY", 0.05)
    clock, replica = HandClock(), Replica()
    settings = estate.settings()
    settings.data_dir.mkdir()
    soon = replica.pki.now + timedelta(seconds=60)
    async with SqliteStore.open(settings.data_dir / "broker.db") as store:
        for row in replica.rows():
            await store.write(lambda writer, row=row: writer.put_authority(replace(row, not_after=soon)))
    async with server(settings, clock=clock, environ={}) as one:
        node = Node(await own_bundle(one))
        assert len(next(iter(node.trusted.values())).x509_authorities) == 2
        # Its certificate itself is good for hours.
        leaf = replica.leaf("spiffe://example.org/replica")
        client = Client(one.port, client_context(TlsIdentity((leaf.der,), leaf.key), roots_of(node.trusted)))
        assert await client.get() == (200, False)
        reader, writer = await asyncio.open_connection("127.0.0.1", one.port, ssl=client.context)
        try:
            writer.write(b"GET /keys HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await reader.readuntil(b"\r\n")).split()[1] == b"200"
            clock.step = timedelta(minutes=15)
            async with asyncio.timeout(SECONDS):
                while len(next(iter((await own_bundle(one)).values())).x509_authorities) != 1:
                    await asyncio.sleep(0.02)
                # The connection that was open is closed under it,
                while await reader.read(4096):
                    pass
        except ConnectionError:
            pass
        finally:
            writer.close()
        # and a new one, with the session kept or without, does not come about.
        assert (await client.get())[0] != 200
        client.session = None
        assert (await client.get())[0] != 200
        # The server itself is there for everybody else.
        anybody = Client(one.port, client_context(None, roots_of(node.trusted)))
        assert await anybody.get() == (200, False)


def test_the_good_ones_are_good_because_of_who_signed(house: House) -> None:
    stranger = Pki(house.replica.pki.now)
    assert house.present(house.replica.leaf(issuer=stranger.root("another replica"))).status != 200
    assert house.ask(None).status == 200
