"""The identity half as agents and operators meet it: a real server in this process, real sockets, TLS and SQLite."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key

from broker._proto.broker.server.v1 import entries_pb2, sessions_pb2, watch_pb2
from broker._proto.google.rpc import status_pb2
from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker._proto.spire.api.types import attestation_pb2, selector_pb2, spiffeid_pb2
from broker._proto.spire.api.types import entry_pb2 as entry_types
from broker._proto.spire.api.types.bundle_pb2 import Bundle as BundleMessage
from broker._proto.spire.api.types.status_pb2 import PermissionDeniedDetails
from broker._proto.spire.api.types.x509svid_pb2 import X509SVID
from broker.clock import SystemClock
from broker.server.api.grpc import agent, bundle, entries, entry, health, sessions, svid, watch
from broker.server.app import Server, server
from broker.server.settings import OperationsSettings, RateLimitSettings, ServerSettings, StoreSettings
from broker.spiffe import Bundle, BundleSet, SpiffeId, TrustDomain, verify_jwt_svid, verify_x509_svid
from broker.transport.dialer import SpiffeDialer
from broker.transport.tls import TlsIdentity

DOMAIN = TrustDomain("example.org")
SERVER_ID = SpiffeId.of(DOMAIN, "/spire/server")
DEADLINE = 10


@dataclass
class Estate:
    """Where a server lives; it may be started there more than once."""

    directory: Path
    store_url: str = ""

    def settings(self, **changes) -> ServerSettings:
        return ServerSettings(
            **{
                "trust_domain": "example.org",
                "issuer": "https://localhost:8443",
                "bind_address": "127.0.0.1",
                "bind_port": 0,
                "data_dir": self.directory / "data",
                "runtime_dir": self.directory / "run",
                "operations": OperationsSettings(enabled=False),
                "store": StoreSettings(url=self.store_url),
                # Every node here has the same address.
                "ratelimit": RateLimitSettings(attestation=False),
                **changes,
            }
        )


@pytest.fixture
def estate():
    # Short: a Unix socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    yield Estate(directory)
    shutil.rmtree(directory)


@asynccontextmanager
async def running(estate: Estate, **changes) -> AsyncIterator[Server]:
    async with server(estate.settings(**changes), environ={}) as one:
        yield one


@asynccontextmanager
async def admin_channel(one: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(f"unix:{one.socket_path}") as channel:
        yield channel


class Node:
    """What a node agent holds: its key, its SVID, and the bundle it trusts."""

    def __init__(self, trusted: BundleSet) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.chain: tuple[bytes, ...] = ()
        self.trusted = trusted

    def identity(self) -> TlsIdentity | None:
        return TlsIdentity(self.chain, self.key) if self.chain else None

    @asynccontextmanager
    async def dial(self, port: int) -> AsyncIterator[grpc.aio.Channel]:
        dialer = SpiffeDialer(
            f"127.0.0.1:{port}",
            identity=self.identity,
            bundles=lambda: self.trusted,
            expect=SERVER_ID,
            clock=SystemClock(),
        )
        async with dialer as channel:
            yield channel

    async def attest(self, port: int, token: str) -> SpiffeId:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.chain = ()
        async with self.dial(port) as channel:
            svid_message = await attest_over(channel, token, csr(self.key))
        self.chain = tuple(svid_message.cert_chain)
        return spiffe_id(svid_message.id)


async def attest_over(channel: grpc.aio.Channel, token: str, request: bytes) -> X509SVID:
    call = Stub(channel, agent.BINDING).AttestAgent(timeout=DEADLINE)
    await call.write(attestation(token, request))
    response = await call.read()
    if response is grpc.aio.EOF:
        raise await error_of(call)
    return response.result.svid


async def error_of(call) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), await call.details()
    )


def attestation(token: str, request: bytes) -> agent_pb2.AttestAgentRequest:
    return agent_pb2.AttestAgentRequest(
        params=agent_pb2.AttestAgentRequest.Params(
            data=attestation_pb2.AttestationData(type="join_token", payload=token.encode()),
            params=agent_pb2.AgentX509SVIDParams(csr=request),
        )
    )


def csr(key: ec.EllipticCurvePrivateKey, *names: str) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    if names:
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(name) for name in names])
        builder = builder.add_extension(san, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


def spiffe_id(message: spiffeid_pb2.SPIFFEID) -> SpiffeId:
    return SpiffeId.of(TrustDomain(message.trust_domain), message.path)


def id_message(identity: SpiffeId) -> spiffeid_pb2.SPIFFEID:
    return spiffeid_pb2.SPIFFEID(trust_domain=identity.trust_domain.name, path=identity.path)


def bundle_of(message: BundleMessage) -> BundleSet:
    return BundleSet.of(
        Bundle(
            TrustDomain(message.trust_domain),
            tuple(x509.load_der_x509_certificate(one.asn1) for one in message.x509_authorities),
            {one.key_id: load_der_public_key(one.public_key) for one in message.jwt_authorities},
            sequence=message.sequence_number,
        )
    )


async def own_bundle(one: Server) -> BundleSet:
    async with admin_channel(one) as channel:
        return bundle_of(await Stub(channel, bundle.BINDING).GetBundle(bundle_pb2.GetBundleRequest(), timeout=DEADLINE))


async def join_token(one: Server, **fields) -> str:
    async with admin_channel(one) as channel:
        token = await Stub(channel, agent.BINDING).CreateJoinToken(
            agent_pb2.CreateJoinTokenRequest(**{"ttl": 600, **fields}), timeout=DEADLINE
        )
        return token.value


async def create_entry(one: Server, parent: SpiffeId, path: str, **fields) -> entries_pb2.RegisteredEntry:
    wanted = entry_types.Entry(
        spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=path),
        parent_id=id_message(parent),
        selectors=[selector_pb2.Selector(type="unix", value="uid:1000")],
        **fields,
    )
    async with admin_channel(one) as channel:
        answer = await Stub(channel, entries.BINDING).BatchCreateEntry(
            entries_pb2.BatchCreateEntryRequest(entries=[entries_pb2.RegisteredEntry(entry=wanted)]), timeout=DEADLINE
        )
    (result,) = answer.results
    assert result.status.code == 0, result.status.message
    return result.entry


@asynccontextmanager
async def attested(one: Server) -> AsyncIterator[tuple[Node, SpiffeId, grpc.aio.Channel]]:
    node = Node(await own_bundle(one))
    agent_id = await node.attest(one.port, await join_token(one))
    async with node.dial(one.port) as channel:
        yield node, agent_id, channel


async def refused(awaitable, code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    assert caught.value.code() is code, caught.value.details()
    return caught.value


async def drain(stream) -> None:
    while await stream.read() is not grpc.aio.EOF:
        pass


def spire_reason(error: grpc.aio.AioRpcError) -> int:
    (raw,) = [value for key, value in error.trailing_metadata() if key == "grpc-status-details-bin"]
    details = PermissionDeniedDetails()
    assert any(detail.Unpack(details) for detail in status_pb2.Status.FromString(raw).details)
    return details.reason


async def test_a_join_token_admits_one_node_once(estate):
    async with running(estate) as one:
        token = await join_token(one)
        node = Node(await own_bundle(one))
        agent_id = await node.attest(one.port, token)
        assert agent_id.path.startswith("/spire/agent/join_token/")
        # The secret is in no ID.
        assert token not in str(agent_id)
        assert verify_x509_svid(node.chain, node.trusted, now=SystemClock().now()).id == agent_id

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await node.attest(one.port, token)
        # As SPIRE says it.
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.bears("I11")
async def test_of_fifty_nodes_with_one_token_one_is_admitted(estate):
    async with running(estate) as one:
        token, node = await join_token(one), Node(await own_bundle(one))
        async with node.dial(one.port) as channel:
            outcomes = await asyncio.gather(
                *(attest_over(channel, token, csr(node.key)) for _ in range(50)), return_exceptions=True
            )
        admitted = [outcome for outcome in outcomes if isinstance(outcome, X509SVID)]
        assert len(admitted) == 1
        refusals = [outcome for outcome in outcomes if isinstance(outcome, grpc.aio.AioRpcError)]
        assert {refusal.code() for refusal in refusals} == {grpc.StatusCode.INVALID_ARGUMENT}
        assert len(refusals) == 49


async def test_a_new_entry_is_on_the_open_stream_at_once(estate):
    async with running(estate) as one, attested(one) as (_, agent_id, channel):
        stream = Stub(channel, watch.BINDING).Watch(watch_pb2.WatchRequest())
        first = await asyncio.wait_for(stream.read(), DEADLINE)
        assert first.WhichOneof("kind") == "snapshot"
        assert not first.snapshot.entries
        assert [one.trust_domain for one in first.snapshot.bundles] == ["example.org"]
        assert not first.snapshot.more

        delays = []
        for number in range(20):
            start = time.perf_counter()
            created = await create_entry(one, agent_id, f"/app/{number}")
            update = await asyncio.wait_for(stream.read(), DEADLINE)
            delays.append(time.perf_counter() - start)
            assert [entry.entry.id for entry in update.delta.upserted] == [created.entry.id]
            assert update.seq > first.seq
        assert sorted(delays)[len(delays) // 2] < 0.5
        stream.cancel()


async def test_a_stream_is_resumed_where_it_broke(estate):
    async with running(estate) as one, attested(one) as (_, agent_id, channel):
        stub = Stub(channel, watch.BINDING)
        kept, gone = await create_entry(one, agent_id, "/kept"), await create_entry(one, agent_id, "/gone")
        stream = stub.Watch(watch_pb2.WatchRequest())
        snapshot = await asyncio.wait_for(stream.read(), DEADLINE)
        assert {entry.entry.id for entry in snapshot.snapshot.entries} == {kept.entry.id, gone.entry.id}
        stream.cancel()

        added = await create_entry(one, agent_id, "/added")
        async with admin_channel(one) as admin:
            await Stub(admin, entry.BINDING).BatchDeleteEntry(entry_pb2.BatchDeleteEntryRequest(ids=[gone.entry.id]))
        stream = stub.Watch(watch_pb2.WatchRequest(cursor=snapshot.seq, store=snapshot.store))
        delta = await asyncio.wait_for(stream.read(), DEADLINE)
        assert [entry.entry.id for entry in delta.delta.upserted] == [added.entry.id]
        assert list(delta.delta.deleted_ids) == [gone.entry.id]
        assert delta.delta.bundles
        stream.cancel()

        # Another store's cursor means nothing.
        stream = stub.Watch(watch_pb2.WatchRequest(cursor=snapshot.seq, store="another"))
        assert (await asyncio.wait_for(stream.read(), DEADLINE)).WhichOneof("kind") == "snapshot"
        stream.cancel()


@pytest.mark.bears("I04")
async def test_svids_are_signed_for_own_entries_only(estate):
    async with running(estate) as one, attested(one) as (node, agent_id, channel):
        mine = await create_entry(one, agent_id, "/app", dns_names=["app.example.org"])
        other = await create_entry(one, SpiffeId("spiffe://example.org/spire/agent/join_token/other"), "/other")
        key = ec.generate_private_key(ec.SECP256R1())
        # What the request says of names is not looked at.
        request = csr(key, "spiffe://example.org/spire/server")
        answer = await Stub(channel, svid.BINDING).BatchNewX509SVID(
            svid_pb2.BatchNewX509SVIDRequest(
                params=[
                    svid_pb2.NewX509SVIDParams(entry_id=mine.entry.id, csr=request),
                    svid_pb2.NewX509SVIDParams(entry_id=other.entry.id, csr=request),
                    svid_pb2.NewX509SVIDParams(entry_id=mine.entry.id, csr=b"nonsense"),
                ]
            ),
            timeout=DEADLINE,
        )
        assert [result.status.code for result in answer.results] == [0, 5, 3]
        signed = verify_x509_svid(answer.results[0].svid.cert_chain, node.trusted, now=SystemClock().now())
        assert str(signed.id) == "spiffe://example.org/app"
        assert signed.not_after - signed.not_before <= timedelta(hours=1, seconds=30)
        names = signed.leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["app.example.org"]


@pytest.mark.bears("JW-04", "JW-05", "JW-06", "JW-07", "JW-08")
async def test_jwt_svids_are_signed_for_allowed_audiences_only(estate):
    async with (
        running(estate, default_allowed_audiences=("here",)) as one,
        attested(one) as (node, agent_id, channel),
    ):
        mine = await create_entry(one, agent_id, "/app")
        stub = Stub(channel, svid.BINDING)
        answer = await stub.NewJWTSVID(svid_pb2.NewJWTSVIDRequest(entry_id=mine.entry.id, audience=["here"]))
        token = verify_jwt_svid(answer.svid.token, node.trusted, audience="here", now=SystemClock().now())
        assert str(token.id) == "spiffe://example.org/app"
        assert token.claims["jti"]
        request = svid_pb2.NewJWTSVIDRequest(entry_id=mine.entry.id, audience=["elsewhere"])
        await refused(stub.NewJWTSVID(request), grpc.StatusCode.PERMISSION_DENIED)
        request = svid_pb2.NewJWTSVIDRequest(entry_id=mine.entry.id)
        await refused(stub.NewJWTSVID(request), grpc.StatusCode.INVALID_ARGUMENT)


async def test_a_restarted_server_and_its_agents_know_each_other(estate):
    async with running(estate) as one:
        node = Node(await own_bundle(one))
        agent_id = await node.attest(one.port, await join_token(one))
        created = await create_entry(one, agent_id, "/app")
        old = next(iter(node.trusted.values()))
    # The agent has the old bundle and its old SVID; the server has a new authority and its old TLS SVID.
    async with running(estate) as one, node.dial(one.port) as channel:
        stream = Stub(channel, watch.BINDING).Watch(watch_pb2.WatchRequest())
        snapshot = await asyncio.wait_for(stream.read(), DEADLINE)
        assert [entry.entry.id for entry in snapshot.snapshot.entries] == [created.entry.id]
        (published,) = bundle_of(snapshot.snapshot.bundles[0]).values()
        assert set(old.x509_authorities) < set(published.x509_authorities)
        assert (published.sequence or 0) > (old.sequence or 0)
        key = ec.generate_private_key(ec.SECP256R1())
        params = svid_pb2.NewX509SVIDParams(entry_id=created.entry.id, csr=csr(key))
        answer = await Stub(channel, svid.BINDING).BatchNewX509SVID(
            svid_pb2.BatchNewX509SVIDRequest(params=[params]), timeout=DEADLINE
        )
        chain = answer.results[0].svid.cert_chain
        now = SystemClock().now()
        assert verify_x509_svid(chain, BundleSet.of(published), now=now).authority not in old.x509_authorities
        stream.cancel()


async def test_a_renewed_svid_ends_the_one_before_it_at_its_first_use(estate):
    async with running(estate) as one, attested(one) as (node, _, channel):
        renewed = Node(node.trusted)
        answer = await Stub(channel, agent.BINDING).RenewAgent(
            agent_pb2.RenewAgentRequest(params=agent_pb2.AgentX509SVIDParams(csr=csr(renewed.key))), timeout=DEADLINE
        )
        renewed.chain = tuple(answer.svid.cert_chain)
        entries_of = entry_pb2.GetAuthorizedEntriesRequest()
        await Stub(channel, entry.BINDING).GetAuthorizedEntries(entries_of, timeout=DEADLINE)
        async with renewed.dial(one.port) as fresh:
            await Stub(fresh, entry.BINDING).GetAuthorizedEntries(entries_of, timeout=DEADLINE)
        error = await refused(
            Stub(channel, entry.BINDING).GetAuthorizedEntries(entries_of, timeout=DEADLINE),
            grpc.StatusCode.PERMISSION_DENIED,
        )
        assert spire_reason(error) == PermissionDeniedDetails.AGENT_NOT_ACTIVE


async def test_a_banned_agent_is_cut_off_and_stays_out(estate):
    async with running(estate) as one, attested(one) as (node, agent_id, channel):
        stream = Stub(channel, watch.BINDING).Watch(watch_pb2.WatchRequest())
        await asyncio.wait_for(stream.read(), DEADLINE)
        async with admin_channel(one) as admin:
            await Stub(admin, agent.BINDING).BanAgent(agent_pb2.BanAgentRequest(id=id_message(agent_id)))
            shown = await Stub(admin, agent.BINDING).GetAgent(agent_pb2.GetAgentRequest(id=id_message(agent_id)))
            assert shown.banned
            assert not shown.x509svid_serial_number
        # Its stream has ended: the connection was closed under it.
        with pytest.raises(grpc.aio.AioRpcError):
            await asyncio.wait_for(drain(stream), DEADLINE)
        async with node.dial(one.port) as again:
            error = await refused(
                Stub(again, watch.BINDING).Watch(watch_pb2.WatchRequest(), timeout=DEADLINE).read(),
                grpc.StatusCode.PERMISSION_DENIED,
            )
            assert spire_reason(error) == PermissionDeniedDetails.AGENT_BANNED


async def test_roles_are_kept(estate):
    async with running(estate) as one:
        trusted = await own_bundle(one)
        stranger = Node(trusted)
        async with stranger.dial(one.port) as channel:
            # The bundle is for everybody, the rest is not.
            await Stub(channel, bundle.BINDING).GetBundle(bundle_pb2.GetBundleRequest(), timeout=DEADLINE)
            for call in (
                Stub(channel, agent.BINDING).ListAgents(agent_pb2.ListAgentsRequest()),
                Stub(channel, agent.BINDING).CreateJoinToken(agent_pb2.CreateJoinTokenRequest()),
                Stub(channel, svid.BINDING).BatchNewX509SVID(svid_pb2.BatchNewX509SVIDRequest()),
                Stub(channel, sessions.BINDING).ReportSessions(sessions_pb2.ReportSessionsRequest()),
                Stub(channel, entries.BINDING).ListEntries(entries_pb2.ListEntriesRequest()),
            ):
                await refused(call, grpc.StatusCode.PERMISSION_DENIED)
        async with admin_channel(one) as admin:
            await refused(
                Stub(admin, svid.BINDING).BatchNewX509SVID(svid_pb2.BatchNewX509SVIDRequest()),
                grpc.StatusCode.PERMISSION_DENIED,
            )
            answer = await Stub(admin, health.BINDING).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_entries_have_the_semantics_of_spire(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        parent = SpiffeId("spiffe://example.org/spire/agent/join_token/x")
        created = await create_entry(one, parent, "/app", hint="a")
        stub = Stub(admin, entry.BINDING)
        again = entry_types.Entry()
        again.CopyFrom(created.entry)
        again.id = ""
        (result,) = (
            await stub.BatchCreateEntry(entry_pb2.BatchCreateEntryRequest(entries=[again]), timeout=DEADLINE)
        ).results
        assert (result.status.code, result.entry.id) == (6, created.entry.id)

        edited = entry_types.Entry(id=created.entry.id, hint="b", x509_svid_ttl=7)
        (result,) = (
            await stub.BatchUpdateEntry(
                entry_pb2.BatchUpdateEntryRequest(entries=[edited], input_mask=entry_types.EntryMask(hint=True)),
                timeout=DEADLINE,
            )
        ).results
        assert (result.entry.hint, result.entry.x509_svid_ttl, result.entry.revision_number) == ("b", 0, 1)

        wanted = entry_pb2.ListEntriesRequest.Filter(by_spiffe_id=id_message(SpiffeId("spiffe://example.org/none")))
        answer = await stub.ListEntries(entry_pb2.ListEntriesRequest(filter=wanted), timeout=DEADLINE)
        assert not answer.entries
        for number in range(5):
            await create_entry(one, parent, f"/page/{number}")
        found, token = set(), ""
        while True:
            request = entry_pb2.ListEntriesRequest(page_size=2, page_token=token)
            answer = await stub.ListEntries(request, timeout=DEADLINE)
            found |= {entry.spiffe_id.path for entry in answer.entries}
            token = answer.next_page_token
            if not token:
                break
        assert len(found) == 6
        (result,) = (await stub.BatchDeleteEntry(entry_pb2.BatchDeleteEntryRequest(ids=["none"]))).results
        assert result.status.code == 5


async def test_a_join_token_may_bring_an_extra_identity(estate):
    async with running(estate) as one:
        alias = SpiffeId("spiffe://example.org/node/a")
        node = Node(await own_bundle(one))
        await node.attest(one.port, await join_token(one, agent_id=id_message(alias)))
        created = await create_entry(one, alias, "/app")
        async with node.dial(one.port) as channel:
            answer = await Stub(channel, entry.BINDING).GetAuthorizedEntries(entry_pb2.GetAuthorizedEntriesRequest())
        assert created.entry.id in {entry.id for entry in answer.entries}


PROGRAM = """
import asyncio, sys
from pathlib import Path
from broker.errors import Misconfigured
from broker.server import app
from broker.server.settings import load
import os
try:
    asyncio.run(app.run(load(Path(sys.argv[1]), os.environ)))
except Misconfigured as error:
    sys.exit(f"{error.reason}: {error.message}")
"""


def program(estate: Estate, **environ) -> subprocess.Popen[bytes]:
    settings = estate.directory / "server.toml"
    settings.write_text(
        f"""
        [server]
        bind_address = "127.0.0.1"
        bind_port = 0
        data_dir = "{estate.directory}/data"
        runtime_dir = "{estate.directory}/run"
        [server.operations]
        enabled = false
        """
    )
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(settings)], env={**os.environ, **environ}, stderr=subprocess.PIPE
    )


@pytest.mark.bears("A25", "W16")
async def test_the_program_ends_when_it_is_told_and_leaves_no_core(estate):
    process = program(estate)
    try:
        socket = estate.settings().socket_path
        async with asyncio.timeout(30):
            while not socket.exists():
                assert process.poll() is None
                await asyncio.sleep(0.02)
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            check = Stub(channel, health.BINDING).Check
            await check(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=DEADLINE)
        limits = Path(f"/proc/{process.pid}/limits").read_text("ascii")
        assert "Max core file size        0                    0" in limits
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 10) == 0
        assert time.monotonic() - start < 10
        assert not socket.exists()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("environ", "code"),
    [
        ({"BROKER_FAILPOINTS": "x=exit"}, b"failpoints_not_allowed"),
        ({"BROKER_SERVER__ROLES": '["tasks"]'}, b"roles_not_supported"),
        ({"BROKER_SERVER__KEYS__MANAGER": "paper"}, b"misconfigured: server.keys.manager"),
    ],
)
async def test_the_program_does_not_start_with_what_it_cannot_keep(estate, environ, code):
    process = program(estate, **environ)
    _, said = await asyncio.to_thread(process.communicate, timeout=30)
    assert process.returncode != 0
    assert code in said


async def test_minting_is_for_operators_and_not_for_reserved_ids(estate):
    async with running(estate) as one, admin_channel(one) as admin:
        stub, key = Stub(admin, svid.BINDING), ec.generate_private_key(ec.SECP256R1())
        minted = await stub.MintX509SVID(svid_pb2.MintX509SVIDRequest(csr=csr(key, "spiffe://example.org/job")))
        signed = verify_x509_svid(minted.svid.cert_chain, await own_bundle(one), now=SystemClock().now())
        assert str(signed.id) == "spiffe://example.org/job"
        for name in ("spiffe://example.org/spire/server", "spiffe://example.org", "spiffe://other.org/job"):
            await refused(
                stub.MintX509SVID(svid_pb2.MintX509SVIDRequest(csr=csr(key, name))), grpc.StatusCode.INVALID_ARGUMENT
            )
