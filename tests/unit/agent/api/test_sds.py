"""Envoy's secret discovery: names, forms, versions and nonces, and who gets nothing."""

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from broker._proto.envoy.config.core.v3 import base_pb2
from broker._proto.envoy.extensions.transport_sockets.tls.v3 import secret_pb2, tls_spiffe_validator_config_pb2
from broker._proto.envoy.service.discovery.v3 import discovery_pb2
from broker._proto.envoy.type.v3 import semantic_version_pb2
from broker._proto.google.protobuf import struct_pb2
from broker._proto.google.rpc import status_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.types import bundle_pb2
from broker.agent.api.secrets import SecretNames, uses_validator
from broker.agent.listener import SDS
from broker.spiffe import TrustDomain
from tests.fakes.fake_server import FakeCa, entry_message
from tests.fakes.running_agent import ME, estate, until

ME_ID = "spiffe://example.org/wl/me"
SECRET = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
OTHER = TrustDomain("other.example")


def node(major: int = 1, minor: int = 30, **metadata) -> base_pb2.Node:
    made = base_pb2.Node(id="envoy", metadata=struct_pb2.Struct())
    made.metadata.update(metadata)
    version = semantic_version_pb2.SemanticVersion(major_number=major, minor_number=minor)
    made.user_agent_build_version.version.CopyFrom(version)
    return made


def request(*names: str, **more) -> discovery_pb2.DiscoveryRequest:
    return discovery_pb2.DiscoveryRequest(**({"resource_names": names, "type_url": SECRET, "node": node()} | more))


def secrets(response) -> dict[str, secret_pb2.Secret]:
    found = [secret_pb2.Secret.FromString(one.value) for one in response.resources]
    assert all(one.type_url == SECRET for one in response.resources)
    return {one.name: one for one in found}


def domains(secret: secret_pb2.Secret) -> dict[str, bytes]:
    validator = secret.validation_context.custom_validator_config
    assert validator.name == "envoy.tls.cert_validator.spiffe"
    config = tls_spiffe_validator_config_pb2.SPIFFECertValidatorConfig()
    assert validator.typed_config.Unpack(config)
    return {one.name: one.trust_bundle.inline_bytes for one in config.trust_domains}


@asynccontextmanager
async def sds(**changed):
    async with estate(**changed) as agent, agent.channel() as channel:
        yield agent, Stub(channel, SDS)


async def fetched(stub, *names: str, **more):
    return secrets(await stub.FetchSecrets(request(*names, **more), timeout=30))  # without the security header


async def refused(awaited) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as why:
        await awaited
    return why.value.code(), why.value.details()


async def test_by_name_come_the_certificate_with_its_key_and_the_bundles() -> None:
    async with sds() as (agent, stub):
        found = await fetched(stub, "default", "ROOTCA", "ALL", ME_ID, "spiffe://example.org")
        assert set(found) == {"default", "ROOTCA", "ALL", ME_ID, "spiffe://example.org"}
        certificate = found["default"].tls_certificate
        leaf = x509.load_pem_x509_certificate(certificate.certificate_chain.inline_bytes)
        key = load_pem_private_key(certificate.private_key.inline_bytes, None)
        form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert key.public_key().public_bytes(*form) == leaf.public_key().public_bytes(*form)
        root = agent.server.ca.root.public_bytes(Encoding.PEM)
        for name in ("ROOTCA", "ALL", "spiffe://example.org"):
            assert domains(found[name]) == {"example.org": root}


async def test_no_name_asks_for_everything() -> None:
    async with sds() as (_, stub):
        assert set(await fetched(stub)) == {ME_ID, "spiffe://example.org"}
        assert set(await fetched(stub, "")) == {ME_ID, "spiffe://example.org"}


async def test_federated_bundles_are_those_of_the_entries_alone() -> None:
    async with sds(entries=[entry_message("e1", "/wl/me", [ME], federates_with=["other.example"])]) as (agent, stub):
        agent.server.push_bundles(FakeCa(OTHER).message(), FakeCa(TrustDomain("third.example")).message())
        await until(lambda: OTHER in agent.agent.cache.bundles)
        found = await fetched(stub, "ALL", "spiffe://other.example")
        assert set(domains(found["ALL"])) == {"example.org", "other.example"}
        assert set(domains(found["spiffe://other.example"])) == {"other.example"}
        code, words = await refused(fetched(stub, "spiffe://third.example", "spiffe://example.org/x"))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert words == (
            "workload is not authorized for the requested identities"
            ' ["spiffe://example.org/x" "spiffe://third.example"]'
        )


async def test_an_envoy_without_the_validator_gets_authorities_alone() -> None:
    async with sds() as (agent, stub):
        root = agent.server.ca.root.public_bytes(Encoding.PEM)
        for old in (node(1, 17), node(disable_spiffe_cert_validation=True)):
            found = await fetched(stub, "ROOTCA", node=old)
            assert found["ROOTCA"].validation_context.trusted_ca.inline_bytes == root
            assert (await refused(fetched(stub, "ALL", node=old)))[0] == grpc.StatusCode.INTERNAL


@pytest.mark.parametrize(("minor", "used"), [(17, False), (18, True), (None, True)])
def test_who_does_not_say_its_version_is_new(minor, used) -> None:
    assert uses_validator(base_pb2.Node() if minor is None else node(1, minor), SecretNames()) is used


async def test_a_bundle_without_authorities_is_nothing_to_verify_by() -> None:
    # Envoy would verify nobody under an empty trusted_ca.
    async with sds(entries=[entry_message("e1", "/wl/me", [ME], federates_with=["other.example"])]) as (agent, stub):
        agent.server.push_bundles(bundle_pb2.Bundle(trust_domain="other.example", sequence_number=1))
        await until(lambda: OTHER in agent.agent.cache.bundles)
        assert set(domains((await fetched(stub, "ALL"))["ALL"])) == {"example.org"}
        assert set(await fetched(stub)) == {ME_ID, "spiffe://example.org"}
        assert (await refused(fetched(stub, "spiffe://other.example")))[0] == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("said", "setting", "used"),
    [(True, False, False), ("true", False, False), ("0", True, True), ("maybe", True, False), (7, False, True)],
)
def test_the_nodes_metadata_stands_over_the_setting(said, setting, used) -> None:
    names = SecretNames(is_validator_disabled=setting)
    assert uses_validator(node(disable_spiffe_cert_validation=said), names) is used


async def test_the_names_are_settings() -> None:
    changed = {"default_svid_name": "me", "default_bundle_name": "us", "default_all_bundles_name": "everybody"}
    async with sds(sds=changed) as (_, stub):
        assert set(await fetched(stub, "me", "us", "everybody")) == {"me", "us", "everybody"}
        assert (await refused(fetched(stub, "default")))[0] == grpc.StatusCode.INVALID_ARGUMENT


async def test_who_has_no_entry_gets_nothing_and_deltas_are_not_served() -> None:
    async with sds(entries=[entry_message("e1", "/x", ["unix:uid:4294967"])]) as (_, stub):
        denied = (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        assert await refused(fetched(stub, "ROOTCA")) == denied
        call = stub.StreamSecrets()
        await call.write(request("ROOTCA"))
        assert await refused(call.read()) == denied
        delta = stub.DeltaSecrets()
        assert (await refused(delta.read()))[0] == grpc.StatusCode.UNIMPLEMENTED


async def test_versions_and_nonces_and_what_is_pushed() -> None:
    async with sds() as (agent, stub):
        call = stub.StreamSecrets()
        await call.write(request("default"))
        first = await asyncio.wait_for(call.read(), 30)
        assert (first.version_info, bool(first.nonce), first.type_url) == ("1", True, SECRET)
        # Acknowledged, without the node: nothing new, so no answer; then a change is pushed.
        ack = {"version_info": "1", "response_nonce": first.nonce, "node": None}
        await call.write(request("default", **ack))
        changed = entry_message("e1", "/wl/me", [ME], revision=1)
        changed.entry.dns_names.append("me.example.org")
        agent.server.put(changed)
        second = await asyncio.wait_for(call.read(), 30)
        assert second.version_info == "2"
        assert second.nonce != first.nonce
        assert secrets(second) != secrets(first)
        # A stale nonce is passed over; a refusal is noted and not answered; other names are answered at once.
        await call.write(request("ROOTCA", **ack))
        nack = {"version_info": "1", "response_nonce": second.nonce, "error_detail": status_pb2.Status(message="no")}
        await call.write(request("default", **nack))
        await call.write(request("ROOTCA", version_info="2", response_nonce=second.nonce))
        third = await asyncio.wait_for(call.read(), 30)
        assert set(secrets(third)) == {"ROOTCA"}
        assert domains(secrets(third)["ROOTCA"])  # by the node that was named before
        agent.server.remove("e1")
        assert await refused(asyncio.wait_for(call.read(), 30)) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "no identity issued",
        )


async def test_a_client_that_ends_its_half_is_answered_and_let_go() -> None:
    async with sds() as (_, stub):
        call = stub.StreamSecrets()
        await call.write(request("ROOTCA"))
        await call.done_writing()
        assert set(secrets(await asyncio.wait_for(call.read(), 30))) == {"ROOTCA"}
        assert await asyncio.wait_for(call.read(), 30) is grpc.aio.EOF


async def test_a_client_that_only_asks_is_cut() -> None:
    async with sds() as (agent, stub):
        agent.server.sign_gate.clear()
        call = stub.StreamSecrets()
        for number in range(40):
            await call.write(request("default", ME_ID if number % 2 else "ROOTCA"))
        agent.server.sign_gate.set()
        answered = 0
        while (code := await _code(call)) is None:
            answered += 1
        assert answered <= 40
        assert code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK}
        assert (await refused(fetched(stub, *(f"n{n}" for n in range(300)))))[0] == grpc.StatusCode.INVALID_ARGUMENT
        call.cancel()


async def _code(call) -> grpc.StatusCode | None:
    try:
        async with asyncio.timeout(1):
            message = await call.read()
    except TimeoutError:
        return grpc.StatusCode.OK
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK if message is grpc.aio.EOF else None
