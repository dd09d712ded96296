"""Two trust domains with real servers, agents and workloads: bundles travel, peers prove themselves, and trust ends at once."""

import asyncio
import json
import os
import ssl
import sys
import warnings
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import httpx2
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.types import bundle_pb2 as types_pb2
from broker._proto.spire.api.types.federationrelationship_pb2 import FederationRelationship
from broker.client import Bundles
from broker.clock import SystemClock
from broker.errors import BrokerError
from broker.keys.local import generated
from broker.sdk.tls import client_context, require_peer, server_context
from broker.server.api.grpc import bundle, trustdomain
from broker.spiffe import Bundle, BundleSet, SpiffeId, TrustDomain
from broker.transport.dialer import SpiffeDialer
from tests.fakes.bundle_endpoints import WebAuthority, endpoint, ok, redirect
from tests.fakes.running_agent import HEADER
from tests.fakes.trust_domains import Side, holds, side

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its generated messages are older than the installed protobuf
    from spiffe import TrustDomain as TheirTrustDomain
    from spiffe import WorkloadApiClient

pytestmark = pytest.mark.timeout(180)


@asynccontextmanager
async def two(directory, *, web: bool = False):
    """Two trust domains; their bundle endpoints are https_spiffe, or https_web under an authority that both know."""
    more = {}
    if web:
        authority = WebAuthority()
        certificate, key = authority.files(directory, "127.0.0.1")
        more = {
            "endpoint": {"profile": "https_web", "cert_file_path": certificate, "key_file_path": key},
            "federation": {"web_ca_path": authority.write(directory / "web.pem")},
        }
    async with side("a.test", directory, **more) as a, side("b.test", directory, **more) as b:
        yield a, b


async def federate(a: Side, b: Side, *, web: bool = False) -> None:
    """Both directions, by https_spiffe or https_web."""
    for one, other in ((a, b), (b, a)):
        await one.relationships.create([await one.relation_to(other, web=web)])
        await one.relationships.refresh(other.name)


async def greet(server_side, client_side, expected: tuple[SpiffeId, SpiffeId]) -> None:
    """A handshake over TCP with mutual TLS; each side says who the other is, by the bundles of its own Workload API."""
    seen: asyncio.Future = asyncio.get_running_loop().create_future()

    async def serve(reader, writer):
        try:
            peer = require_peer(writer.get_extra_info("ssl_object"), server_side.bundles, [expected[1]])
            writer.write(b"hello")
            await writer.drain()
            seen.set_result(peer.id)
        except BrokerError as error:
            seen.set_exception(error)
        finally:
            writer.transport.abort() if seen.done() and seen.exception() else writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=server_context(server_side))
    port = listening.sockets[0].getsockname()[1]
    try:
        context = client_context(client_side, check_hostname=False)
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
        try:
            peer = require_peer(writer.get_extra_info("ssl_object"), client_side.bundles, [expected[0]])
            assert peer.id == expected[0]
            if await asyncio.wait_for(reader.read(5), 30) != b"hello":
                raise ConnectionError("the service closed the connection")
        finally:
            writer.transport.abort()
        assert await asyncio.wait_for(seen, 30) == expected[1]
    finally:
        listening.close()
        await listening.wait_closed()


def federation_call(one: Side, method: str, request, service=trustdomain.BINDING):
    return getattr(Stub(one.channel, service), method)(request, timeout=30)


@pytest.mark.bears("FE-05", "FE-08", "FE-10", "FE-14", "FE-15", "WA-10", "WA-15", "WA-21", "X05")
@pytest.mark.parametrize("profile", ["https_spiffe", "https_web"])
async def test_workloads_of_two_trust_domains_prove_themselves_to_each_other_until_it_is_ended(
    directory, profile
) -> None:
    web = profile == "https_web"
    async with two(directory, web=web) as (a, b):
        await federate(a, b, web=web)
        shown = await b.relationships.list()
        assert [one.WhichOneof("bundle_endpoint_profile") for one in shown] == [profile]
        async with a.workload("/client", b) as mine, b.workload("/service", a) as theirs:
            await holds(mine, a, b)
            await holds(theirs, a, b)
            ids = (SpiffeId("spiffe://b.test/service"), SpiffeId("spiffe://a.test/client"))
            await greet(theirs, mine, ids)
            token = await mine.jwt_svid("spiffe://b.test/service")
            assert (await theirs.validate_jwt_svid(token.token, audience="spiffe://b.test/service"))[0] == ids[1]
            # FE-04: a.test's bundle speaks for a.test alone.
            assert {name.name: bundle.trust_domain.name for name, bundle in theirs.bundles.items()} == {
                "a.test": "a.test",
                "b.test": "b.test",
            }
            # The end, on one side: on the open streams, and for everything that comes after.
            await b.relationships.delete("a.test")
            await holds(theirs, b)
            with pytest.raises((BrokerError, ssl.SSLError, ConnectionError)):
                await greet(theirs, mine, ids)
            with pytest.raises(BrokerError):
                await theirs.validate_jwt_svid(token.token, audience="spiffe://b.test/service")
            assert set(mine.bundles) == {a.trust_domain, b.trust_domain}


@pytest.mark.bears("WA-10", "WA-11", "WA-15")
async def test_an_independent_client_sees_bundles_come_and_go_on_one_stream(directory) -> None:
    async with two(directory) as (a, b):
        await federate(a, b)
        await b.register("/service", "a.test")
        socket = f"unix://{b.agent.socket}"

        def theirs():
            with WorkloadApiClient(socket_path=socket) as client:
                return client.fetch_x509_bundles(), client.fetch_jwt_bundles()

        x509_bundles, jwt_bundles = await asyncio.to_thread(theirs)
        foreign = TheirTrustDomain("a.test")
        assert x509_bundles.get_bundle_for_trust_domain(foreign) is not None
        assert jwt_bundles.get_bundle_for_trust_domain(foreign) is not None
        async with b.agent.workload() as stub:
            svids = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
            jwts = stub.FetchJWTBundles(workload_pb2.JWTBundlesRequest(), metadata=HEADER)
            assert set((await asyncio.wait_for(svids.read(), 30)).federated_bundles) == {"spiffe://a.test"}
            assert set((await asyncio.wait_for(jwts.read(), 30)).bundles) == {"spiffe://a.test", "spiffe://b.test"}
            # The bundle itself, by the verb of SPIRE's operators: the entry names it, so it goes with that.
            await b.federated.delete_federated("a.test", "dissociate")
            assert set((await asyncio.wait_for(svids.read(), 30)).federated_bundles) == set()
            assert set((await asyncio.wait_for(jwts.read(), 30)).bundles) == {"spiffe://b.test"}


@pytest.mark.bears("FE-05", "FE-10", "FE-01")
async def test_https_web_by_settings_and_a_new_authority_travels(directory) -> None:
    web = WebAuthority()
    certificate, key = web.files(directory, "127.0.0.1")
    endpoint = {"profile": "https_web", "cert_file_path": certificate, "key_file_path": key}
    async with side("b.test", directory, endpoint=endpoint, agent=False) as b:
        federation = {
            "web_ca_path": web.write(directory / "web.pem"),
            "federates_with": (
                {"trust_domain": "b.test", "bundle_endpoint_url": b.url, "bundle_endpoint_profile": "https_web"},
            ),
        }
        async with side("a.test", directory, federation=federation) as a, a.workload("/app", "b.test") as me:
            await holds(me, a, b)
            before = me.bundles[b.trust_domain]
            # What the settings say is not shown among the relationships, and not ended by command: as in SPIRE.
            assert await a.relationships.list() == []
            # A new authority there, and the next look brings it to the open stream here.
            new = Bundle.parse(b.trust_domain, (await _fetched(b, web)).content)
            root = web.certificate.public_bytes(Encoding.DER)
            appended = await federation_call(
                b, "AppendBundle", bundle_pb2.AppendBundleRequest(
                    x509_authorities=[types_pb2.X509Certificate(asn1=root)]
                ), bundle.BINDING,
            )  # fmt: skip
            assert appended.sequence_number == (new.sequence or 0) + 1
            await a.relationships.refresh("b.test")
            async with asyncio.timeout(30):
                while me.bundles.get(b.trust_domain) == before:
                    await asyncio.sleep(0.01)
            assert len(me.bundles[b.trust_domain].x509_authorities) == len(before.x509_authorities) + 1


async def _fetched(of: Side, web: WebAuthority) -> httpx2.Response:
    context = ssl.create_default_context(cadata=web.certificate.public_bytes(Encoding.DER))
    async with httpx2.AsyncClient(verify=context, trust_env=False) as client:
        return await client.get(of.url)


@pytest.mark.bears("FE-03")
async def test_what_was_fetched_outlives_the_server_and_the_endpoint(directory) -> None:
    async with side("b.test", directory, agent=False) as b:
        async with side("a.test", directory, agent=False) as a:
            await a.relationships.create([await a.relation_to(b)])
            await a.relationships.refresh("b.test")
            held = await a.federated.get_federated("b.test")
        async with side("a.test", directory, agent=False) as a:
            assert await a.federated.get_federated("b.test") == held
            # By the stored bundle, not by the one to begin with: b.test's server kept its authority.
            await a.relationships.refresh("b.test")
    async with side("a.test", directory, agent=False) as a:
        with pytest.raises(BrokerError, match="failed to refresh bundle"):
            await a.relationships.refresh("b.test")
        assert (await a.federated.get_federated("b.test")).trust_domain == "b.test"


@pytest.mark.bears("FE-04", "X05")
async def test_a_foreign_svid_is_known_at_our_port_and_may_do_what_everybody_may(directory) -> None:
    async with two(directory) as (a, b):
        await federate(a, b)
        own = Bundle(
            a.trust_domain,
            tuple(x509.load_der_x509_certificate(one.asn1) for one in (await a.bundle()).x509_authorities),
        )
        # An admin there is nobody here.
        async with b.workload("/boss", admin=True) as theirs:
            identity = (await theirs.identity()).tls
            dialer = SpiffeDialer(
                f"127.0.0.1:{a.running.port}",
                identity=lambda: identity,
                bundles=lambda: BundleSet.of(own),
                expect=SpiffeId("spiffe://a.test/spire/server"),
                clock=SystemClock(),
            )
            async with dialer as channel:
                assert (await Bundles(channel).get()).trust_domain == "a.test"
                for method, request in (
                    ("CountBundles", bundle_pb2.CountBundlesRequest()),
                    ("GetFederatedBundle", bundle_pb2.GetFederatedBundleRequest(trust_domain="b.test")),
                    ("AppendBundle", bundle_pb2.AppendBundleRequest()),
                ):
                    with pytest.raises(grpc.aio.AioRpcError) as refused:
                        await getattr(Stub(channel, bundle.BINDING), method)(request, timeout=30)
                    assert refused.value.code() is grpc.StatusCode.PERMISSION_DENIED
                # The end of the relationship closes its connection, and no other is made.
                await a.relationships.delete("b.test")
                async with asyncio.timeout(30):
                    while True:
                        try:
                            await Bundles(channel, timeout=30).get()
                        except BrokerError:
                            break


async def test_the_command(directory) -> None:
    async with side("a.test", directory, agent=False) as a, side("b.test", directory, agent=False) as b:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("BROKER_", "SPIFFE_"))}

        async def run(of: Side, *arguments: str, stdin: str = "", code: int = 0) -> str:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "broker.cli.main", *arguments,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
                env={**environment, "BROKER_SERVER_SOCKET": str(of.running.socket_path)},
            )  # fmt: skip
            out, err = await process.communicate(stdin.encode())
            assert process.returncode == code, (arguments, out, err)
            return out.decode()

        pem = await run(b, "bundle", "show")
        assert pem.startswith("-----BEGIN CERTIFICATE-----")
        document = await run(b, "bundle", "show", "-format", "spiffe")
        assert Bundle.parse(b.trust_domain, document).jwt_authorities
        (directory / "b.pem").write_text(pem)
        create = [
            "federation", "create", "-trustDomain", "b.test", "-bundleEndpointURL", b.url,
            "-bundleEndpointProfile", "https_spiffe", "-endpointSpiffeID", "spiffe://b.test/spire/server",
            "-trustDomainBundlePath", str(directory / "b.pem"),
        ]  # fmt: skip
        made = json.loads(await run(a, *create, "-o", "json"))
        assert (made["trust_domain"], made["bundle_endpoint_profile"]) == ("b.test", "https_spiffe")
        await run(a, *create, code=1)
        refreshed = json.loads(await run(a, "federation", "refresh", "-id", "b.test", "-o", "json"))
        assert refreshed["kind"] == "bundle"
        assert refreshed["jwt_count"] == 1
        listed = json.loads(await run(a, "bundle", "list", "-o", "json"))
        assert [one["trust_domain"] for one in listed["items"]] == ["b.test"]
        shown = await run(a, "bundle", "list", "-id", "spiffe://b.test", "-format", "spiffe")
        assert json.loads(shown)["keys"] == json.loads(document)["keys"]
        assert "https_spiffe" in await run(a, "federation", "show", "b.test")
        update = [one if one != "create" else "update" for one in create]
        await run(a, *update[:-2])
        data = json.dumps({"federationRelationships": [
            {"trustDomain": "c.test", "bundleEndpointURL": "https://127.0.0.1:1/", "bundleEndpointProfile": "https_web"},
        ]})  # fmt: skip
        await run(a, "federation", "create", "-data", "-", stdin=data)
        listed = json.loads(await run(a, "federation", "list", "-o", "json"))
        assert [one["trust_domain"] for one in listed["items"]] == ["b.test", "c.test"]
        await run(a, "bundle", "set", "-id", "spiffe://c.test", "-format", "pem", stdin=pem)
        await run(a, "bundle", "delete", "-id", "c.test", "-mode", "dissociate", "--yes")
        await run(a, "bundle", "delete", "c.test", "--yes", code=3)
        await run(a, "federation", "delete", "-id", "b.test", "--yes")
        assert json.loads(await run(a, "bundle", "list", "-o", "json"))["items"] == []
        await run(a, "federation", "refresh", "b.test", code=3)


@pytest.mark.bears("SP04", "X05")
async def test_a_hostile_endpoint_changes_nothing_of_what_is_held(directory) -> None:
    """Older keys, another's document, too much of it, another address: what is held stays, and each is told. Nothing is held only
    where the endpoint itself says so by a newer, empty document (ADR 0023)."""
    web = WebAuthority()
    keys = {name: generated(name).public_key for name in ("old", "new")}
    named = TrustDomain("b.test")
    good = Bundle(named, (), {"new": keys["new"]}, sequence=7)
    older = Bundle(named, (), {"old": keys["old"]}, sequence=6)
    bad = {
        "older": ok(older.to_json()),
        "no document": ok("[]"),
        "another format": ok('{"keys":[{"kty":"EC","use":"sig"}],"spiffe_sequence":"9"}'),
        "no numbers": ok('{"keys":{},"spiffe_sequence":-1}'),
        "10 MB": ok(b" " * 10_000_000 + good.to_json().encode()),
        "redirect to http": redirect("http://127.0.0.1/bundle"),
        "redirect within the machine": redirect("https://169.254.169.254/latest"),
        "refused": b"HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n",
    }
    answer = ok(good.to_json())
    async with endpoint(web.issue("127.0.0.1"), lambda _: answer) as theirs:
        federation = {"web_ca_path": web.write(directory / "web.pem")}
        async with side("a.test", directory, federation=federation, agent=False) as a:
            made = FederationRelationship(trust_domain="b.test", bundle_endpoint_url=theirs.url())
            made.https_web.SetInParent()
            await a.relationships.create([made])
            await a.relationships.refresh("b.test")
            held = await a.federated.get_federated("b.test")
            assert (held.sequence_number, [one.key_id for one in held.jwt_authorities]) == (7, ["new"])
            for name, each in bad.items():
                answer = each
                with pytest.raises(BrokerError):
                    await a.relationships.refresh("b.test")
                assert await a.federated.get_federated("b.test") == held, name
                assert len(theirs.seen) >= 2
            # Theirs alone: a document that names nobody is the one of the trust domain that was asked for.
            assert [one.trust_domain for one in await a.federated.list_federated()] == ["b.test"]
            answer = ok(Bundle(named, sequence=8).to_json())
            await a.relationships.refresh("b.test")
            assert list((await a.federated.get_federated("b.test")).jwt_authorities) == []
