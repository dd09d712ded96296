"""A server below another one of ours: one trust domain, two servers, SVIDs of either verified under the roots of the upper."""

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker._proto.service import ServiceBinding, Stub
from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.server.localauthority.v1 import localauthority_pb2 as pb
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker._proto.spire.api.types import bundle_pb2 as types_pb2
from broker.clock import SystemClock
from broker.sdk import Workload
from broker.server.settings import ServerUpstreamSettings, UpstreamSettings
from broker.spiffe import Bundle, BundleSet, SpiffeId, verify_jwt_svid, verify_x509_svid
from broker.spiffe.certificates import split_der
from broker.transport.dialer import SpiffeDialer
from tests.fakes.running_agent import HEADER, until
from tests.fakes.small_estate import TD, issuer_key_id, leaf_of, running_agent, running_server

SVID = ServiceBinding.of(svid_pb2.DESCRIPTOR, "SVID")
BUNDLE = ServiceBinding.of(bundle_pb2.DESCRIPTOR, "Bundle")
SERVER = SpiffeId.of(TD, "/spire/server")


def below(upper, upper_agent):
    spire = ServerUpstreamSettings(
        server_address="127.0.0.1", server_port=upper.server.port, workload_api_socket=upper_agent.socket
    )
    return UpstreamSettings(spire=spire)


@asynccontextmanager
async def nested(directory, **changed):
    """Upper server and its agent, lower server and its agent; this process is a workload of both agents."""
    async with running_server(directory, "upper") as upper, running_agent(upper, directory, "a") as upper_agent:
        await upper.register(upper_agent.agent.node.id.path, "/lower", downstream=True)
        async with (
            running_server(directory, "lower", upstream=below(upper, upper_agent), **changed) as lower,
            running_agent(lower, directory, "b") as lower_agent,
        ):
            await lower.register(lower_agent.agent.node.id.path, "/wl/below")
            yield upper, upper_agent, lower, lower_agent


@asynccontextmanager
async def as_workload(server, agent):
    """A connection to a server with the SVID that this process has from an agent."""
    async with Workload.connect(f"unix://{agent.socket}") as me:
        await me.identity()
        async with SpiffeDialer(
            f"127.0.0.1:{server.server.port}",
            identity=lambda: me.current.tls,
            bundles=lambda: me.bundles,
            expect=SERVER,
            clock=SystemClock(),
        ) as channel:
            yield channel


@pytest.mark.bears("K04", "X5-05", "X5-07", "X5-10", "X5-17")
async def test_what_the_lower_signs_verifies_under_the_upper(directory):
    async with nested(directory) as (upper, upper_agent, lower, lower_agent):
        roots = await upper.roots()
        assert await lower.roots() == roots
        svid = (await lower_agent.x509()).svids[0]
        chain = split_der(svid.x509_svid)
        assert len(chain) == 2
        under_upper = BundleSet.of(Bundle(TD, tuple(roots)))
        verified = verify_x509_svid(chain, under_upper, now=datetime.now(UTC))
        assert str(verified.id) == "spiffe://example.org/wl/below"
        authority = x509.load_der_x509_certificate(chain[1])
        assert authority.subject.rfc4514_string().count("DOWNSTREAM-1") == 1
        limits = [
            one.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
            for one in (roots[0], authority)
        ]
        assert limits[0] - limits[1] == 1
        assert authority.not_valid_after_utc <= roots[0].not_valid_after_utc
        # JWT keys go all the way up, so a token of the lower verifies at the upper's agent.
        token = (await lower_agent.jwt("aud")).svids[0].svid
        async with upper_agent.workload() as stub:
            request = workload_pb2.ValidateJWTSVIDRequest(audience="aud", svid=token)
            await until(lambda: len(upper_agent.agent.cache.own_bundle.jwt_authorities) == 2)
            answer = await stub.ValidateJWTSVID(request, metadata=HEADER)
            assert answer.spiffe_id == "spiffe://example.org/wl/below"
        # And the upper's keys come down.
        theirs = await upper_agent.jwt("aud")
        await until(lambda: len(lower_agent.agent.cache.own_bundle.jwt_authorities) == 2)
        verify_jwt_svid(theirs.svids[0].svid, lower_agent.agent.cache.bundles, audience="aud", now=datetime.now(UTC))


@pytest.mark.bears("K04")
async def test_a_root_above_is_tainted_and_everything_below_follows(directory):
    async with nested(directory) as (upper, _, lower, lower_agent), lower_agent.workload() as stub:
        call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
        first = await call.read()
        (old,) = await upper.authorities.list("x509")
        made = await upper.authorities.prepare("x509")
        await upper.authorities.activate("x509", made.id)
        local = lower.local
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await local.TaintX509Authority(pb.TaintX509AuthorityRequest(authority_id=old.id))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        state = await local.GetX509AuthorityState(pb.GetX509AuthorityStateRequest())
        assert state.active.upstream_authority_subject_key_id == old.id
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await local.TaintX509UpstreamAuthority(pb.TaintX509UpstreamAuthorityRequest(subject_key_id=old.id))
        assert "unable to use upstream authority" in caught.value.details()

        # Tainted at the top: told to the lower server, which asks for a new authority by itself.
        await upper.authorities.taint("x509", old.id)
        async with asyncio.timeout(30):
            while True:
                message = await call.read()
                chain = split_der(message.svids[0].x509_svid)
                if issuer_key_id(x509.load_der_x509_certificate(chain[-1])) == made.id:
                    break
        assert leaf_of(message.svids[0]) != leaf_of(first.svids[0])
        await upper.authorities.revoke("x509", old.id)
        async with asyncio.timeout(30):
            while len(await lower.roots()) != 1:
                await asyncio.sleep(0.05)
        await until(lambda: len(lower_agent.agent.cache.own_bundle.x509_authorities) == 1)
        assert (await lower_agent.x509()).svids
        call.cancel()


@pytest.mark.bears("I04", "S11")
async def test_who_may_be_below_and_what_counts_of_a_request(directory):
    async with running_server(directory, "upper") as upper, running_agent(upper, directory, "a") as agent:
        entry = await upper.register(agent.agent.node.id.path, "/lower")
        key = ec.generate_private_key(ec.SECP256R1())
        spki = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        wish = x509.CertificateSigningRequestBuilder().subject_name(
            x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "evil")])
        )
        wish = wish.add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://evil.example/x")]), critical=True
        )
        request = svid_pb2.NewDownstreamX509CARequest(csr=wish.sign(key, hashes.SHA256()).public_bytes(Encoding.DER))
        ends = int((datetime.now(UTC) + timedelta(hours=1)).timestamp())
        publish = bundle_pb2.PublishJWTAuthorityRequest(
            jwt_authority=types_pb2.JWTKey(public_key=spki, key_id="k1", expires_at=ends)
        )
        async with as_workload(upper, agent) as channel:
            svid, bundle = Stub(channel, SVID), Stub(channel, BUNDLE)
            for call in (svid.NewDownstreamX509CA(request), bundle.PublishJWTAuthority(publish)):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            await upper.entries.delete(entry)
            await upper.register(agent.agent.node.id.path, "/lower", downstream=True)
            made = await svid.NewDownstreamX509CA(request)
            authority = x509.load_der_x509_certificate(made.ca_cert_chain[0])
            assert len(made.ca_cert_chain) == 1
            assert "evil" not in authority.subject.rfc4514_string()
            names = authority.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            assert [str(one.value) for one in names] == ["spiffe://example.org"]
            # preferred_ttl counts, within the life of who signs.
            for ttl, longest in ((60, timedelta(seconds=60)), (10 * 24 * 3600, timedelta(hours=24))):
                request.preferred_ttl = ttl
                short = x509.load_der_x509_certificate((await svid.NewDownstreamX509CA(request)).ca_cert_chain[0])
                assert short.not_valid_after_utc - datetime.now(UTC) <= longest
            answer = await bundle.PublishJWTAuthority(publish)
            assert "k1" in {one.key_id for one in answer.jwt_authorities}
            other = ec.generate_private_key(ec.SECP256R1()).public_key()
            publish.jwt_authority.public_key = other.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bundle.PublishJWTAuthority(publish)
            assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS
            for bad in (
                bundle_pb2.PublishJWTAuthorityRequest(),
                bundle_pb2.PublishJWTAuthorityRequest(jwt_authority=types_pb2.JWTKey(public_key=spki)),
                bundle_pb2.PublishJWTAuthorityRequest(jwt_authority=types_pb2.JWTKey(public_key=b"x", key_id="k2")),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await bundle.PublishJWTAuthority(bad)
                assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await bundle.PublishWITAuthority(bundle_pb2.PublishWITAuthorityRequest())
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
