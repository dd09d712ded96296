"""A real server in this process, and a node with nothing but raw gRPC: what tests of the identity half share."""

import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.google.rpc import status_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.types import attestation_pb2, selector_pb2, spiffeid_pb2
from broker._proto.spire.api.types import entry_pb2 as entry_types
from broker._proto.spire.api.types.bundle_pb2 import Bundle as BundleMessage
from broker._proto.spire.api.types.status_pb2 import PermissionDeniedDetails
from broker._proto.spire.api.types.x509svid_pb2 import X509SVID
from broker.clock import SystemClock
from broker.server.api.grpc import agent, bundle, entries
from broker.server.app import Server, server
from broker.server.settings import OperationsSettings, RateLimitSettings, ServerSettings, StoreSettings
from broker.spiffe import Bundle, BundleSet, SpiffeId, TrustDomain
from broker.transport.dialer import SpiffeDialer
from broker.transport.tls import TlsIdentity

DOMAIN = TrustDomain("example.org")
SERVER_ID = SpiffeId.of(DOMAIN, "/spire/server")
DEADLINE = 30


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
