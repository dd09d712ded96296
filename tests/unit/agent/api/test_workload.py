"""The Workload API over the real socket, before a fake server."""

import asyncio
from datetime import timedelta

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import WORKLOAD
from broker.errors import Refused
from broker.spiffe import BundleSet, SpiffeId, TrustDomain, verify_jwt_svid, verify_x509_svid
from broker.spiffe.x509svid import split_der
from tests.fakes.fake_server import FakeCa, entry_message
from tests.fakes.running_agent import HEADER, ME, RunningAgent, estate, until

METHODS = [
    ("FetchX509SVID", workload_pb2.X509SVIDRequest()),
    ("FetchX509Bundles", workload_pb2.X509BundlesRequest()),
    ("FetchJWTSVID", workload_pb2.JWTSVIDRequest(audience=["x"])),
    ("FetchJWTBundles", workload_pb2.JWTBundlesRequest()),
    ("ValidateJWTSVID", workload_pb2.ValidateJWTSVIDRequest(audience="x", svid="y")),
]
OTHER = ["unix:uid:4294967"]


async def outcome(stub: Stub, name: str, request, metadata=HEADER):
    """The status and words of a call that must fail."""
    call = getattr(stub, name)(request, metadata=metadata, timeout=30)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await (call.read() if WORKLOAD.methods[name].streams_out else call)
    return failed.value.code(), failed.value.details()


async def opened(agent: RunningAgent, stub: Stub, name: str = "FetchX509SVID"):
    call = getattr(stub, name)(dict(METHODS)[name], metadata=HEADER)
    return call, await asyncio.wait_for(call.read(), 30)


@pytest.mark.bears("WA-06", "WA-12", "A01")
async def test_an_x509_svid_with_its_key_and_bundle() -> None:
    async with estate() as agent:
        (svid,) = (await agent.x509()).svids
        assert svid.spiffe_id == "spiffe://example.org/wl/me"
        verified = verify_x509_svid(
            split_der(svid.x509_svid), BundleSet.of(agent.server.ca.bundle), now=agent.server.ca.clock.now()
        )
        assert str(verified.id) == svid.spiffe_id
        key = load_der_private_key(svid.x509_svid_key, None)
        spki = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        assert key.public_key().public_bytes(*spki) == verified.leaf.public_key().public_bytes(*spki)
        assert split_der(svid.bundle) == [agent.server.ca.root.public_bytes(Encoding.DER)]


@pytest.mark.bears("WE-03", "W01", "WA-27")
async def test_without_the_security_header_nothing_is_answered() -> None:
    async with estate() as agent, agent.workload() as stub:
        for name, request in METHODS:
            for metadata in [
                (),
                (("workload.spiffe.io", "True"),),
                (("workload.spiffe.io", "false"),),
                (("workload.spiffe.io", ""),),
                (("workload.spiffe.io", "true, true"),),
                (("workload.spiffe.io", "true"), ("workload.spiffe.io", "true")),
                (("workload.spiffe.io-bin", b"true"),),
            ]:
                code, words = await outcome(stub, name, request, metadata)
                assert (code, words) == (grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request"), (
                    name,
                    metadata,
                )
        assert len(agent.agent.sessions) == 0  # before attestation


@pytest.mark.bears("WE-09", "WA-14", "A01", "WA-27")
async def test_a_caller_without_an_entry_has_no_identity() -> None:
    async with estate(entries=[entry_message("e1", "/wl/other", OTHER)]) as agent, agent.workload() as stub:
        for name, request in METHODS[:-1]:
            assert await outcome(stub, name, request) == (grpc.StatusCode.PERMISSION_DENIED, "no identity issued"), name


@pytest.mark.bears("W02")
async def test_nothing_that_a_caller_writes_makes_it_another() -> None:
    spoofed = (
        *HEADER,
        ("x-peer-pid", "1"),
        ("x-spiffe-id", "spiffe://example.org/wl/other"),
        ("forwarded", "for=unix"),
        ("x-forwarded-for", "1"),
    )
    async with estate(entries=[entry_message("e1", "/wl/other", OTHER)]) as agent, agent.workload() as stub:
        code, _ = await outcome(stub, *METHODS[0], metadata=spoofed)
        assert code == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.bears("WA-23", "WE-10", "W03")
async def test_wit_is_not_implemented() -> None:
    async with estate() as agent, agent.workload() as stub:
        for name, request in [
            ("FetchWITSVID", workload_pb2.WITSVIDRequest()),
            ("FetchWITBundles", workload_pb2.WITBundlesRequest()),
        ]:
            code, _ = await outcome(stub, name, request)
            assert code == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.bears("WE-08", "W03")
async def test_before_the_first_sync_it_says_try_again() -> None:
    async with estate(synced=False, server_port=1) as agent, agent.workload() as stub:
        for name, request in METHODS[:-1]:
            code, _ = await outcome(stub, name, request)
            assert code == grpc.StatusCode.UNAVAILABLE, name


async def test_an_entry_that_comes_while_the_caller_waits_is_served() -> None:
    async with estate(entries=[entry_message("e0", "/wl/other", OTHER)], first_identity_wait="5s") as agent:
        waiting = asyncio.create_task(agent.x509())
        token = asyncio.create_task(agent.jwt("x"))
        await until(lambda: len(agent.agent.sessions) == 1)
        agent.server.put(entry_message("e1", "/wl/me", [ME]))
        assert (await waiting).svids[0].spiffe_id == "spiffe://example.org/wl/me"
        assert (await token).svids[0].spiffe_id == "spiffe://example.org/wl/me"


@pytest.mark.bears("WA-04", "WA-08", "WA-15", "W04")
async def test_a_stream_follows_the_entries_with_full_sets() -> None:
    async with estate() as agent, agent.workload() as stub:
        call, first = await opened(agent, stub)
        agent.server.put(entry_message("e2", "/wl/two", [ME], hint="two", created_at=2_000_000_000))
        second = await asyncio.wait_for(call.read(), 30)
        assert [one.spiffe_id for one in second.svids] == ["spiffe://example.org/wl/me", "spiffe://example.org/wl/two"]
        assert second.svids[0] == first.svids[0]  # the same, not signed again
        agent.server.remove("e1")
        third = await asyncio.wait_for(call.read(), 30)
        assert [(one.spiffe_id, one.hint) for one in third.svids] == [("spiffe://example.org/wl/two", "two")]
        agent.server.remove("e2")
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(call.read(), 30)
        assert (ended.value.code(), ended.value.details()) == (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")


@pytest.mark.bears("W04")
async def test_nothing_is_sent_when_nothing_changed() -> None:
    async with estate() as agent, agent.workload() as stub:
        call, _ = await opened(agent, stub)
        agent.server.put(entry_message("e2", "/wl/other", OTHER))
        agent.server.push_bundles(agent.server.ca.message())
        agent.agent.cache.ring_all()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(call.read(), 0.5)


@pytest.mark.bears("WA-05", "WA-10", "WA-16")
async def test_bundles_own_and_federated() -> None:
    other, stranger = FakeCa(TrustDomain("other.example")), FakeCa(TrustDomain("stranger.example"))
    entry = entry_message("e1", "/wl/me", [ME], federates_with=["other.example", "missing.example"])
    async with estate(entries=[entry]) as agent, agent.workload() as stub:
        for ca in (other, stranger):
            agent.server.push_bundles(ca.message())
        await until(lambda: len(agent.agent.cache.bundles) == 3)
        response = await agent.x509()
        assert dict(response.federated_bundles) == {"spiffe://other.example": other.bundle.x509_der()}
        call, bundles = await opened(agent, stub, "FetchX509Bundles")
        assert dict(bundles.bundles) == {
            "spiffe://example.org": agent.server.ca.bundle.x509_der(),
            "spiffe://other.example": other.bundle.x509_der(),
        }
        _, jwt = await opened(agent, stub, "FetchJWTBundles")
        assert dict(jwt.bundles) == {
            "spiffe://example.org": agent.server.ca.bundle.jwks().encode(),
            "spiffe://other.example": other.bundle.jwks().encode(),
        }
        newer = FakeCa(TrustDomain("other.example"))
        agent.server.push_bundles(newer.message())
        assert (await asyncio.wait_for(call.read(), 30)).bundles["spiffe://other.example"] == newer.bundle.x509_der()
        agent.server.put(entry_message("e1", "/wl/me", [ME], revision=1))
        assert set((await asyncio.wait_for(call.read(), 30)).bundles) == {"spiffe://example.org"}


async def test_a_foreign_bundle_without_x509_authorities_is_absent_for_x509() -> None:
    # py-spiffe cannot read nothing, and would be left without its own SVID.
    foreign = TrustDomain("other.example")
    entry = entry_message("e1", "/wl/me", [ME], federates_with=["other.example"])
    async with estate(entries=[entry]) as agent, agent.workload() as stub:
        told = FakeCa(foreign).message()
        del told.x509_authorities[:]
        agent.server.push_bundles(told)
        await until(lambda: foreign in agent.agent.cache.bundles)
        assert not (await agent.x509()).federated_bundles
        _, bundles = await opened(agent, stub, "FetchX509Bundles")
        assert set(bundles.bundles) == {"spiffe://example.org"}
        _, jwt = await opened(agent, stub, "FetchJWTBundles")
        assert set(jwt.bundles) == {"spiffe://example.org", "spiffe://other.example"}


@pytest.mark.bears("WA-17", "WA-18", "WA-25")
async def test_jwt_svids_of_one_identity_or_of_all() -> None:
    entries = [
        entry_message("e2", "/wl/two", [ME], created_at=2),
        entry_message("e1", "/wl/one", [ME], created_at=1, hint="h"),
        entry_message("e3", "/wl/three", OTHER),
    ]
    async with estate(entries=entries) as agent, agent.workload() as stub:
        response = await agent.jwt("a", "b")
        assert [(one.spiffe_id, one.hint) for one in response.svids] == [
            ("spiffe://example.org/wl/one", "h"),
            ("spiffe://example.org/wl/two", ""),
        ]
        for one in response.svids:
            svid = verify_jwt_svid(
                one.svid, BundleSet.of(agent.server.ca.bundle), audience="b", now=agent.server.ca.clock.now()
            )
            assert str(svid.id) == one.spiffe_id
            assert set(svid.audience) == {"a", "b"}
        (only,) = (await agent.jwt("a", spiffe_id="spiffe://example.org/wl/two")).svids
        assert only.spiffe_id == "spiffe://example.org/wl/two"
        for wanted in ("spiffe://example.org/wl/three", "spiffe://other.example/x"):
            request = workload_pb2.JWTSVIDRequest(audience=["a"], spiffe_id=wanted)
            assert await outcome(stub, "FetchJWTSVID", request) == (
                grpc.StatusCode.PERMISSION_DENIED,
                "no identity issued",
            )


@pytest.mark.bears("WA-09", "WA-27", "W03")
async def test_what_a_jwt_request_must_say() -> None:
    async with estate() as agent, agent.workload() as stub:
        for request, words in [
            (workload_pb2.JWTSVIDRequest(), "audience must be specified"),
            (workload_pb2.JWTSVIDRequest(audience=["a", ""]), "audience must be specified"),
            (
                workload_pb2.JWTSVIDRequest(audience=["a"], spiffe_id="x"),
                "invalid requested SPIFFE ID: scheme is missing or invalid",
            ),
            (workload_pb2.JWTSVIDRequest(audience=[str(n) for n in range(65)]), "at most 64 audiences of 1024 bytes"),
            (workload_pb2.JWTSVIDRequest(audience=["a" * 1025]), "at most 64 audiences of 1024 bytes"),
        ]:
            assert await outcome(stub, "FetchJWTSVID", request) == (grpc.StatusCode.INVALID_ARGUMENT, words)
        for request, words in [
            (workload_pb2.ValidateJWTSVIDRequest(svid="x"), "audience must be specified"),
            (workload_pb2.ValidateJWTSVIDRequest(audience="x"), "svid must be specified"),
        ]:
            assert await outcome(stub, "ValidateJWTSVID", request) == (grpc.StatusCode.INVALID_ARGUMENT, words)


async def test_an_audience_that_the_entry_forbids_is_denied() -> None:
    entries = [
        entry_message("e1", "/wl/one", [ME], allowed_audiences=["a"], created_at=1),
        entry_message("e2", "/wl/two", [ME], created_at=2),
    ]
    async with estate(entries=entries) as agent, agent.workload() as stub:
        assert [one.spiffe_id for one in (await agent.jwt("b")).svids] == ["spiffe://example.org/wl/two"]
        request = workload_pb2.JWTSVIDRequest(audience=["b"], spiffe_id="spiffe://example.org/wl/one")
        code, _ = await outcome(stub, "FetchJWTSVID", request)
        assert code == grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.bears("WA-20", "WA-21", "WA-22")
async def test_validation() -> None:
    foreign = FakeCa(TrustDomain("other.example"))
    async with (
        estate(entries=[entry_message("e1", "/wl/me", [ME], federates_with=["other.example"])]) as agent,
        agent.workload() as stub,
    ):
        agent.server.push_bundles(foreign.message(), FakeCa(TrustDomain("stranger.example")).message())
        await until(lambda: len(agent.agent.cache.bundles) == 3)
        ours = agent.server.ca.token(
            SpiffeId("spiffe://example.org/x"), ["aud"], colour="red", nested={"a": [1, None, True]}
        )
        request = workload_pb2.ValidateJWTSVIDRequest(audience="aud", svid=ours)
        response = await stub.ValidateJWTSVID(request, metadata=HEADER)
        assert response.spiffe_id == "spiffe://example.org/x"
        assert (response.claims["colour"], response.claims["aud"][0], response.claims["nested"]["a"][2]) == (
            "red",
            "aud",
            True,
        )
        theirs = foreign.token(SpiffeId("spiffe://other.example/x"), ["aud"], colour="red")
        response = await stub.ValidateJWTSVID(
            workload_pb2.ValidateJWTSVIDRequest(audience="aud", svid=theirs), metadata=HEADER
        )
        assert set(response.claims) == {"sub", "aud", "exp"}
        for token, audience in [
            (ours, "other"),
            (ours[:-2] + "AA", "aud"),
            ("x", "aud"),
            (agent.server.ca.token(SpiffeId("spiffe://example.org/x"), ["aud"], timedelta(hours=-1)), "aud"),
        ]:
            code, _ = await outcome(
                stub, "ValidateJWTSVID", workload_pb2.ValidateJWTSVIDRequest(audience=audience, svid=token)
            )
            assert code == grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.bears("WA-21")
async def test_validation_trusts_only_what_the_caller_federates_with() -> None:
    foreign = FakeCa(TrustDomain("other.example"))
    async with estate() as agent, agent.workload() as stub:
        agent.server.push_bundles(foreign.message())
        await until(lambda: len(agent.agent.cache.bundles) == 2)
        token = foreign.token(SpiffeId("spiffe://other.example/x"), ["aud"])
        code, words = await outcome(
            stub, "ValidateJWTSVID", workload_pb2.ValidateJWTSVIDRequest(audience="aud", svid=token)
        )
        assert code == grpc.StatusCode.INVALID_ARGUMENT
        assert "no bundle" in words


@pytest.mark.bears("WA-27", "O01")
async def test_a_jwt_svid_that_cannot_be_had_is_unavailable() -> None:
    async with estate() as agent, agent.workload() as stub:
        agent.server.drop()
        await agent.server.listener.stop()
        code, words = await outcome(stub, "FetchJWTSVID", workload_pb2.JWTSVIDRequest(audience=["a"]))
        assert code == grpc.StatusCode.UNAVAILABLE
        assert words.startswith("could not fetch JWT-SVID: ")


async def test_a_server_that_refuses_to_sign_means_no_identity() -> None:
    async with estate() as agent, agent.workload() as stub:
        agent.server.refuse_signing = Refused("no", code="x")
        assert await outcome(stub, *METHODS[0]) == (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")


async def test_dns_names_reach_the_certificate() -> None:
    entry = entry_message("e1", "/wl/me", [ME])
    entry.entry.dns_names.append("me.example.org")
    async with estate(entries=[entry]) as agent:
        (svid,) = (await agent.x509()).svids
        names = x509.load_der_x509_certificate(split_der(svid.x509_svid)[0]).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
        assert names.value.get_values_for_type(x509.DNSName) == ["me.example.org"]


@pytest.mark.bears("W03")
async def test_an_entry_that_changes_while_a_jwt_is_signed_costs_its_caller_nothing() -> None:
    entries = [entry_message("e1", "/wl/me", [ME]), entry_message("e2", "/wl/two", [ME])]
    async with estate(entries=entries) as agent:
        agent.server.sign_gate.clear()
        waiting = asyncio.create_task(agent.jwt("a"))
        await until(lambda: any(session.pending for session in agent.agent.sessions))
        version = agent.agent.cache.version
        agent.server.put(entry_message("e1", "/wl/me", [ME], hint="new", revision=1))
        agent.server.remove("e2")
        await until(lambda: agent.agent.cache.version >= version + 2)
        agent.server.entries["e2"] = entries[1]  # signed by the server, and gone here
        agent.server.sign_gate.set()
        (svid,) = (await waiting).svids
        assert (svid.spiffe_id, svid.hint) == ("spiffe://example.org/wl/me", "new")
