"""What nobody is to be issued, whatever is asked: CSRs, TTLs, other agents' entries, reserved names; I04 and I10."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker._proto.spire.api.types import entry_pb2 as types_pb2
from broker._proto.spire.api.types import selector_pb2, spiffeid_pb2
from broker._proto.spire.api.types.x509svid_pb2 import X509SVID
from broker.clock import SystemClock
from broker.server.api.grpc import agent, entries, entry, svid
from broker.server.api.http.token_formats import ACCESS_TOKEN, GRANT_TYPE
from broker.server.app import Server
from broker.spiffe import SpiffeId, verify_jwt_svid, verify_x509_svid
from broker.transport.tls import TlsIdentity
from tests.conformance.house import ONE, SECONDS, TWO, Answer, House
from tests.integration.identity_rig import (
    Estate,
    Node,
    admin_channel,
    attest_over,
    attestation,
    attested,
    create_entry,
    csr,
    id_message,
    join_token,
    own_bundle,
    refused,
    running,
)

CODES = grpc.StatusCode
SERVER = "spiffe://example.org/spire/server"
INT32 = 2**31 - 1


@pytest.fixture
def estate() -> Iterator[Estate]:
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    yield Estate(directory)
    shutil.rmtree(directory)


@asynccontextmanager
async def with_entry(estate: Estate, **fields: Any) -> AsyncIterator[tuple[Server, Node, grpc.aio.Channel, str]]:
    """A server, an agent of it, and an entry of that agent."""
    async with running(estate) as one, attested(one) as (node, agent_id, channel):
        created = await create_entry(one, agent_id, "/app", **fields)
        yield one, node, channel, created.entry.id


async def sign(channel: grpc.aio.Channel, entry_id: str, *requests: bytes) -> list[Any]:
    wanted = [svid_pb2.NewX509SVIDParams(entry_id=entry_id, csr=request) for request in requests]
    answer = await Stub(channel, svid.BINDING).BatchNewX509SVID(
        svid_pb2.BatchNewX509SVIDRequest(params=wanted), timeout=SECONDS
    )
    return list(answer.results)


def greedy(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A CSR that asks for everything: another subject, the server's ID, a DNS name, an authority's rights."""
    wanted = [x509.UniformResourceIdentifier(SERVER), x509.DNSName("server.example.org")]
    usage = {name: name in {"key_cert_sign", "crl_sign"} for name in (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    )}  # fmt: skip
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "root")]))
        .add_extension(x509.SubjectAlternativeName(wanted), critical=True)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(**usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([x509.ObjectIdentifier("1.2.3.4")]), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.mark.bears("I04", "I10")
async def test_nothing_is_taken_from_a_request_but_its_key(estate: Estate) -> None:
    async with with_entry(estate) as (_, node, channel, entry_id):
        key = ec.generate_private_key(ec.SECP256R1())
        (plain,) = await sign(channel, entry_id, csr(key))
        (result,) = await sign(channel, entry_id, greedy(key))
        expected, leaf = (x509.load_der_x509_certificate(one.svid.cert_chain[0]) for one in (plain, result))
        assert leaf.public_key() == key.public_key()
        # Everything but what differs between any two certificates is what a modest request gets.
        assert [(one.oid, one.critical, one.value) for one in leaf.extensions] == [
            (one.oid, one.critical, one.value) for one in expected.extensions
        ]
        assert leaf.subject == expected.subject
        verified = verify_x509_svid(result.svid.cert_chain, node.trusted, now=SystemClock().now())
        assert str(verified.id) == "spiffe://example.org/app"
        # An agent's own renewal is no other: it gets its own name.
        answer = await Stub(channel, agent.BINDING).RenewAgent(
            agent_pb2.RenewAgentRequest(params=agent_pb2.AgentX509SVIDParams(csr=greedy(key))), timeout=SECONDS
        )
        renewed = verify_x509_svid(answer.svid.cert_chain, node.trusted, now=SystemClock().now())
        assert renewed.id.path.startswith("/spire/agent/join_token/")


def damaged(request: bytes) -> bytes:
    return request[:-1] + bytes([request[-1] ^ 1])


def by_another_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A CSR for one key, signed by another: the public key inside is replaced."""
    other = ec.generate_private_key(ec.SECP256R1())
    point = [one.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint) for one in (key, other)]
    return csr(key).replace(point[0], point[1])


def by_sha1(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A CSR whose digest is SHA-1 (ecdsa-with-SHA1), put together by hand: the library makes none any more."""

    def tagged(tag: int, content: bytes) -> bytes:
        size = len(content)
        return bytes([tag, size] if size < 128 else [tag, 0x81, size]) + content  # none here has more than 255 bytes

    signed = x509.load_der_x509_csr(csr(key)).tbs_certrequest_bytes
    algorithm = tagged(0x30, tagged(0x06, bytes.fromhex("2a8648ce3d0401")))
    signature = tagged(0x03, b"\x00" + key.sign(signed, ec.ECDSA(hashes.SHA1())))
    return tagged(0x30, signed + algorithm + signature)


def signed_by(key: Any, digest: Any = hashes.SHA256) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key, digest and digest()).public_bytes(Encoding.DER)


@pytest.mark.bears("I04")
async def test_requests_that_are_refused(estate: Estate) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    bad = {
        "nothing": b"",
        "no CSR": b"nonsense",
        "more after it": csr(key) + b"\x00",
        "damaged signature": damaged(csr(key)),
        "signed by another key": by_another_key(key),
        "a certificate": x509.load_der_x509_csr(csr(key)).tbs_certrequest_bytes,
        "RSA of 1024 bits": signed_by(rsa.generate_private_key(65537, 1024)),
        "P-192": signed_by(ec.generate_private_key(ec.SECP192R1())),
        "P-224": signed_by(ec.generate_private_key(ec.SECP224R1())),
        "secp256k1": signed_by(ec.generate_private_key(ec.SECP256K1())),
        "Ed25519": signed_by(ed25519.Ed25519PrivateKey.generate(), None),
        "SHA-1": by_sha1(key),
        "SHA-224": signed_by(key, hashes.SHA224),
        "a megabyte": csr(key) + bytes(1 << 20),
        "a megabyte within": large(key),
    }
    async with with_entry(estate) as (_, _, channel, entry_id):
        results = await sign(channel, entry_id, *bad.values())
        assert {name: one.status.code for name, one in zip(bad, results, strict=True)} == dict.fromkeys(
            bad, CODES.INVALID_ARGUMENT.value[0]
        )
        words = {name: one.status.message for name, one in zip(bad, results, strict=True)}
        assert "weak digest" in words["SHA-1"]
        assert "invalid CSR signature" in words["signed by another key"]
        # Each for itself: what is good in the same batch is signed.
        (first, second) = await sign(channel, entry_id, b"", csr(key))
        assert (first.status.code, second.status.code) == (CODES.INVALID_ARGUMENT.value[0], 0)
        good = [ec.generate_private_key(ec.SECP384R1()), rsa.generate_private_key(65537, 2048)]
        assert [one.status.code for one in await sign(channel, entry_id, *map(signed_by, good))] == [0, 0]


def large(key: ec.EllipticCurvePrivateKey) -> bytes:
    names = x509.SubjectAlternativeName([x509.DNSName(f"{number}.example.org") for number in range(50_000)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).add_extension(names, critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.DER)


@pytest.mark.bears("I04")
async def test_another_agents_entry_is_not_there(estate: Estate) -> None:
    async with with_entry(estate) as (one, _, _, entry_id), attested(one) as (_, _, other):
        key = ec.generate_private_key(ec.SECP256R1())
        results = [(await sign(other, asked, csr(key)))[0].status for asked in (entry_id, "nothing-like-it", SERVER)]
        # Not even whether it exists.
        assert {(one.code, one.message) for one in results} == {(CODES.NOT_FOUND.value[0], results[0].message)}
        await refused(
            Stub(other, svid.BINDING).NewJWTSVID(
                svid_pb2.NewJWTSVIDRequest(entry_id=entry_id, audience=["x"]), timeout=SECONDS
            ),
            CODES.NOT_FOUND,
        )


@pytest.mark.bears("I04")
async def test_reserved_ids_are_nobodys(estate: Estate) -> None:
    paths = ("/spire/server", "/spire", "/spire/agent/join_token/x", "/spire/agent/x509pop/x", "/spire/else")
    async with running(estate) as one, admin_channel(one) as admin:
        key = ec.generate_private_key(ec.SECP256R1())
        for path in paths:
            wanted = types_pb2.Entry(
                spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=path),
                parent_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path="/spire/agent/join_token/a"),
                selectors=[selector_pb2.Selector(type="unix", value="uid:1")],
            )
            for stub, request in (
                (Stub(admin, entry.BINDING), entry_pb2.BatchCreateEntryRequest(entries=[wanted])),
                (
                    Stub(admin, entries.BINDING),
                    entries_pb2.BatchCreateEntryRequest(entries=[entries_pb2.RegisteredEntry(entry=wanted)]),
                ),
            ):
                (result,) = (await stub.BatchCreateEntry(request, timeout=SECONDS)).results
                assert result.status.code == CODES.INVALID_ARGUMENT.value[0], path
            name = f"spiffe://example.org{path}"
            minting = Stub(admin, svid.BINDING)
            await refused(
                minting.MintX509SVID(svid_pb2.MintX509SVIDRequest(csr=csr(key, name))), CODES.INVALID_ARGUMENT
            )
            await refused(
                minting.MintJWTSVID(svid_pb2.MintJWTSVIDRequest(id=wanted.spiffe_id, audience=["x"])),
                CODES.INVALID_ARGUMENT,
            )
            # The extra identity that a join token may bring is no way around it.
            request = agent_pb2.CreateJoinTokenRequest(agent_id=wanted.spiffe_id)
            await refused(Stub(admin, agent.BINDING).CreateJoinToken(request, timeout=SECONDS), CODES.INVALID_ARGUMENT)


@pytest.mark.bears("I04")
async def test_an_entry_does_not_become_a_reserved_one(estate: Estate) -> None:
    async with with_entry(estate) as (one, _, _, entry_id), admin_channel(one) as admin:
        edited = types_pb2.Entry(id=entry_id, spiffe_id=id_message(SpiffeId(SERVER)))
        mask = types_pb2.EntryMask(spiffe_id=True)
        (result,) = (
            await Stub(admin, entry.BINDING).BatchUpdateEntry(
                entry_pb2.BatchUpdateEntryRequest(entries=[edited], input_mask=mask), timeout=SECONDS
            )
        ).results
        assert result.status.code == CODES.INVALID_ARGUMENT.value[0]


@pytest.mark.bears("I04")
async def test_lives_are_bounded(estate: Estate) -> None:
    async with running(estate) as one, attested(one) as (node, agent_id, channel):
        key = ec.generate_private_key(ec.SECP256R1())
        (authority,) = next(iter(node.trusted.values())).x509_authorities
        for ttl, most in ((0, timedelta(hours=1)), (1, timedelta(seconds=1)), (INT32, None)):
            made = await create_entry(one, agent_id, f"/ttl/{ttl}", x509_svid_ttl=ttl, jwt_svid_ttl=ttl)
            (result,) = await sign(channel, made.entry.id, csr(key))
            leaf = x509.load_der_x509_certificate(result.svid.cert_chain[0])
            assert leaf.not_valid_after_utc <= authority.not_valid_after_utc
            if most is None:
                assert leaf.not_valid_after_utc == authority.not_valid_after_utc
            else:
                assert leaf.not_valid_after_utc - leaf.not_valid_before_utc <= most + timedelta(seconds=31)
            answer = await Stub(channel, svid.BINDING).NewJWTSVID(
                svid_pb2.NewJWTSVIDRequest(entry_id=made.entry.id, audience=["x"]), timeout=SECONDS
            )
            token = verify_jwt_svid(answer.svid.token, node.trusted, audience="x", now=SystemClock().now())
            assert token.expires_at <= authority.not_valid_after_utc + timedelta(seconds=1)
        async with admin_channel(one) as admin:
            for field in ("x509_svid_ttl", "jwt_svid_ttl"):
                wanted = types_pb2.Entry(
                    spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path="/ttl"),
                    parent_id=id_message(agent_id),
                    selectors=[selector_pb2.Selector(type="unix", value="uid:1")],
                    **{field: -1},
                )
                (result,) = (
                    await Stub(admin, entry.BINDING).BatchCreateEntry(
                        entry_pb2.BatchCreateEntryRequest(entries=[wanted]), timeout=SECONDS
                    )
                ).results
                assert result.status.code == CODES.INVALID_ARGUMENT.value[0]
            minting = Stub(admin, svid.BINDING)
            request = svid_pb2.MintX509SVIDRequest(csr=csr(key, "spiffe://example.org/job"), ttl=-1)
            # As in SPIRE: the usual life.
            minted = x509.load_der_x509_certificate(
                (await minting.MintX509SVID(request, timeout=SECONDS)).svid.cert_chain[0]
            )
            assert minted.not_valid_after_utc - minted.not_valid_before_utc <= timedelta(hours=1, seconds=31)
            for ttl in (-1, INT32, -(2**31)):
                request = agent_pb2.CreateJoinTokenRequest(ttl=ttl)
                await refused(
                    Stub(admin, agent.BINDING).CreateJoinToken(request, timeout=SECONDS), CODES.INVALID_ARGUMENT
                )


@pytest.mark.bears("I04")
async def test_a_join_token_names_no_path(estate: Estate) -> None:
    async with running(estate) as one, admin_channel(one) as admin:
        stub = Stub(admin, agent.BINDING)
        for token in (
            "../../server/xxxxxxxxxxx",
            "a/b/cccccccccccccccccc",
            "..",
            ".",
            "%2e%2e%2fserver-xxxxxxx",
            "short",
            "x" * 257,
            "with space xxxxxxxx",
            "nul\x00xxxxxxxxxxxxxx",
        ):
            await refused(
                stub.CreateJoinToken(agent_pb2.CreateJoinTokenRequest(token=token, ttl=60), timeout=SECONDS),
                CODES.INVALID_ARGUMENT,
            )
        # One that looks odd and is good becomes no part of the agent's ID.
        chosen = "a...............-"
        request = agent_pb2.CreateJoinTokenRequest(token=chosen, ttl=60)
        answer = await stub.CreateJoinToken(request, timeout=SECONDS)
        node = Node(await own_bundle(one))
        agent_id = await node.attest(one.port, answer.value)
        assert answer.value not in str(agent_id)
        assert agent_id.path.count("/") == 4


# --- one thing verified, another used -----------------------------------------------------------------------------


@pytest.mark.bears("I10")
async def test_an_attestation_has_one_set_of_parameters(estate: Estate) -> None:
    async with running(estate) as one:
        trusted, first, second = await own_bundle(one), await join_token(one), await join_token(one)
        node = Node(trusted)
        async with node.dial(one.port) as channel:
            call = Stub(channel, agent.BINDING).AttestAgent(timeout=SECONDS)
            # Two parameters at once: the first is judged, and the second never becomes part of it.
            await call.write(attestation(first, csr(node.key)))
            await call.write(attestation(second, csr(ec.generate_private_key(ec.SECP256R1()))))
            response = await call.read()
            leaf = x509.load_der_x509_certificate(response.result.svid.cert_chain[0])
            assert leaf.public_key() == node.key.public_key()
        async with Node(trusted).dial(one.port) as channel:
            # The second token was not used up.
            assert isinstance(await attest_over(channel, second, csr(node.key)), X509SVID)


@pytest.mark.bears("I10")
def test_what_is_said_twice_and_differs_is_refused(house: House) -> None:
    # The exchange: in the form, on the connection, in the token.
    leaf = house.replica.leaf(ONE)
    identity = TlsIdentity((leaf.der,), leaf.key)
    form = {
        "grant_type": GRANT_TYPE, "subject_token": "x", "subject_token_type": ACCESS_TOKEN, "resource": "https://tickets.dev.test",
    }  # fmt: skip

    def post(*more: tuple[str, str]) -> Answer:
        pairs = [*form.items(), *more]
        return house.post(identity, "/token", "&".join(f"{name}={quote(value, safe='')}" for name, value in pairs))

    assert post(("client_id", TWO)).code == "client_mismatch"
    assert post(("resource", "https://other.dev.test")).code == "invalid_target"
    assert post(("audience", "https://other.dev.test")).code == "invalid_target"
    assert post(("subject_token", "y")).code == "parameter_repeated"
    assert post(("task", "tsk_1"), ("task", "tsk_2")).code == "parameter_repeated"
    assert post(("Subject_Token", "y")).code == "parameter_unknown"
    assert house.post(identity, "/token?task=tsk_1", "").code == "parameter_in_query"
    # A scope beside authorization details that do not have it.
    details = '[{"type":"api","locations":["https://tickets.dev.test"],"actions":["read"]}]'
    twice = details.replace('"actions":["read"]', '"actions":["read"],"actions":["write"]')
    assert post(("authorization_details", twice)).code == "invalid_authorization_details"
    assert post(("scope", "write"), ("authorization_details", details), ("purpose", "x")).status == 400
