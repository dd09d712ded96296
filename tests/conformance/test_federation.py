"""SPIFFE Federation, line by line (FE-01 … FE-16), each with real sockets and certificates where the line is about them.

Two lines of the standard are partly other people's: whether an https_web certificate comes from a public authority (FE-10) is its
operator's choice, and this server as an endpoint never redirects (FE-13), which it may.
"""

import asyncio
import json
import ssl
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx2
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from pydantic import ValidationError

from broker.clock import SystemClock
from broker.errors import BrokerError, Invalid, InvalidSvid, Misconfigured
from broker.server.authority import plan
from broker.server.authority.authorities import REFRESH_HINT
from broker.server.federation_settings import configured_relationships
from broker.server.identity.endpoint_client import EndpointClient
from broker.server.identity.relationships import Federation
from broker.server.settings import FederatesWithSettings, ServerSettings
from broker.server.store.bundle_rows import PublishedBundle
from broker.spiffe import Bundle, BundleSet, SpiffeId, TrustDomain, verify_x509_svid
from broker.spiffe.federation import DEFAULT_REFRESH, Profile, Relationship, refresh_seconds
from broker.transport.tls import SvidPeer, client_context, judge
from tests.fakes.bundle_endpoints import WebAuthority, endpoint, ok, redirect
from tests.fakes.trust_domains import holds, side
from tests.unit.server.identity.test_polling import ONE, TWO, Fixture
from tests.unit.server.identity.world import world
from tests.unit.server.store.samples import authority as authority_row
from tests.unit.server.store.samples import relationship
from tests.unit.transport.pki import Authority

OTHER = TrustDomain("other.test")
SERVER = SpiffeId("spiffe://other.test/spire/server")
CA, WEB = Authority("other.test"), WebAuthority()


@pytest.fixture
async def here(tmp_path):
    async with world(tmp_path) as one:
        yield one


@pytest.fixture
def fixture(here):
    return Fixture(here)


@pytest.fixture
def client(tmp_path):
    return EndpointClient(SystemClock(), WEB.write(tmp_path / "web.pem"))


@pytest.fixture
def directory():
    # Short: a Unix socket's path has at most 107 bytes.
    with TemporaryDirectory(prefix="fed", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


def spiffe(url: str) -> Relationship:
    return Relationship(OTHER, url, Profile.HTTPS_SPIFFE, SERVER)


def web(url: str) -> Relationship:
    return Relationship(OTHER, url, Profile.HTTPS_WEB)


def serving(bundle: Bundle = CA.bundle):
    return lambda line: ok(bundle.to_json())


async def ask(one, method: str = "GET") -> httpx2.Response:
    """Ask a server's own endpoint, trusting what its bundle says, with no certificate of ours."""
    root = [key.asn1 for key in (await one.bundle()).x509_authorities]
    async with httpx2.AsyncClient(verify=client_context(None, root), trust_env=False) as http:
        return await http.request(method, one.url)


@pytest.mark.bears("FE-01")
async def test_a_key_is_published_long_before_its_use_and_until_nothing_of_it_is_valid(here):
    ttl = ServerSettings().ca_ttl
    row = authority_row(not_after=authority_row().not_before + ttl)
    assert (plan.hand_over(row) - plan.half_life(row)) >= timedelta(seconds=5 * REFRESH_HINT)
    # As it happens: each key that signs was in the bundle at least so long before.
    published, first = {}, here.authorities.x509().id
    for _ in range(96):
        now = here.clock.now()
        for one in here.authorities.rows:
            published.setdefault(one.id, now)
        signing = here.authorities.x509().id
        assert now - published[signing] >= timedelta(seconds=5 * REFRESH_HINT) or signing == first
        here.clock.advance(timedelta(minutes=30))
        await here.rotation.settle()
    # And none is published when all that it signed is over.
    assert all(one.not_after + plan.PRUNE_GRACE >= here.clock.now() for one in here.authorities.rows)
    assert first not in {one.id for one in here.authorities.rows}


@pytest.mark.bears("FE-02")
async def test_the_bundle_says_how_often_it_is_looked_at(fixture):
    assert refresh_seconds(None) == refresh_seconds(CA.bundle) == DEFAULT_REFRESH == 5 * 60
    assert refresh_seconds(CA.bundle.with_refresh_hint(120)) == 120


@pytest.mark.bears("FE-03")
async def test_the_latest_is_stored_and_an_older_one_is_not(fixture):
    await fixture.federate(profile=Profile.HTTPS_WEB, endpoint_id=None)
    await fixture.polling.refresh(OTHER)
    stored = await fixture.here.store.read(lambda reader: reader.federated_bundle(OTHER))
    assert stored is not None
    assert stored.checked().x509_authorities == ONE.bundle.x509_authorities
    fixture.endpoints.answer = TWO.bundle.with_sequence(4)
    with pytest.raises(BrokerError):
        await fixture.polling.refresh(OTHER)
    # Without a number the most recently fetched one wins.
    fixture.endpoints.answer = TWO.bundle
    await fixture.polling.refresh(OTHER)
    assert fixture.here.federated.trusted[OTHER].x509_authorities == TWO.bundle.x509_authorities


@pytest.mark.bears("FE-04")
async def test_bundles_of_two_trust_domains_are_never_one(here):
    third = Authority("third.test")
    await here.relationships.create([Federation(relationship()), Federation(relationship("third.test"))], "op")
    await here.bundles.set([_published(CA), _published(third)], "op")
    now = SystemClock().now()
    for signer, name, is_valid in ((CA, "other.test", True), (third, "other.test", False), (CA, "example.org", False)):
        chain = signer.issue(f"spiffe://{name}/app").chain_der
        if is_valid:
            assert verify_x509_svid(chain, here.federated.trusted, now=now).id.trust_domain == OTHER
        else:
            with pytest.raises(InvalidSvid):
                verify_x509_svid(chain, here.federated.trusted, now=now)


def _published(signer: Authority):
    return PublishedBundle.of(signer.bundle)


@pytest.mark.bears("FE-05")
async def test_both_profiles_are_spoken_on_both_sides(client, directory):
    async with endpoint(CA.issue("/spire/server"), serving()) as one:
        assert await client.fetch(spiffe(one.url()), CA.bundle) == CA.bundle
    async with endpoint(WEB.issue("127.0.0.1"), serving()) as one:
        assert await client.fetch(web(one.url()), None) == CA.bundle
    certificate, key = WEB.files(directory, "127.0.0.1")
    files = {"profile": "https_web", "cert_file_path": certificate, "key_file_path": key}
    async with side("other.test", directory, endpoint=files, agent=False) as one:
        assert (await client.fetch(web(one.url), None)).x509_authorities
    async with side("other.test", directory, agent=False) as one:
        document = (await ask(one)).content
        assert await client.fetch(spiffe(one.url), Bundle.parse(OTHER, document)) == Bundle.parse(OTHER, document)


@pytest.mark.bears("FE-06")
async def test_tls_follows_mozillas_intermediate_level(directory):
    async with side("other.test", directory, agent=False) as one:
        root = [key.asn1 for key in (await one.bundle()).x509_authorities]
        for version, ciphers, is_served in (
            (ssl.TLSVersion.TLSv1_3, None, True),
            (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES256-GCM-SHA384", True),
            (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES256-SHA384:ECDHE-ECDSA-AES128-SHA", False),
        ):
            context = client_context(None, root)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.maximum_version = context.minimum_version = version
            if ciphers:
                context.set_ciphers(ciphers)
            shaking = asyncio.open_connection("127.0.0.1", one.running.bundle_port, ssl=context)
            if is_served:
                _, writer = await shaking
                writer.transport.abort()
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    await shaking


@pytest.mark.bears("FE-07")
def test_url_profile_and_name_are_given_and_never_inferred():
    whole = {
        "trust_domain": "other.test",
        "bundle_endpoint_url": "https://other.test/",
        "bundle_endpoint_profile": "https_spiffe",
        "endpoint_spiffe_id": "spiffe://other.test/spire/server",
    }
    (made,) = configured_relationships(ServerSettings(federation={"federates_with": [whole]}))
    assert made == spiffe("https://other.test/")
    for name in ("trust_domain", "bundle_endpoint_url", "bundle_endpoint_profile"):
        with pytest.raises(ValidationError, match=name):
            FederatesWithSettings(**{key: value for key, value in whole.items() if key != name})
    del whole["endpoint_spiffe_id"]
    with pytest.raises(Misconfigured, match="SPIFFE ID"):
        configured_relationships(ServerSettings(federation={"federates_with": [whole]}))


@pytest.mark.bears("FE-08", "FE-16")
async def test_workloads_learn_whose_bundle_it_is(directory):
    async with side("b.test", directory, agent=False) as b, side("a.test", directory) as a:
        await a.relationships.create([await a.relation_to(b)])
        async with a.workload("/app", b) as me:
            await holds(me, a, b)
            theirs = {key.asn1 for key in (await b.bundle()).x509_authorities}
            shown = me.bundles[b.trust_domain].x509_authorities
            assert {one.public_bytes(Encoding.DER) for one in shown} == theirs


@pytest.mark.bears("FE-09")
@pytest.mark.parametrize(
    "url", ["http://other.test/", "https://user@other.test/", "https://u:p@other.test/", "spiffe://x"]
)
@pytest.mark.parametrize("make", [web, spiffe])
def test_an_endpoint_is_at_an_https_url_without_user_information(url, make):
    with pytest.raises(Invalid):
        make(url)


@pytest.mark.bears("FE-10")
async def test_https_web_needs_no_more_than_the_url_and_checks_the_name(client):
    async with endpoint(WEB.issue("localhost"), serving()) as one:
        assert await client.fetch(web(one.url("localhost")), None) == CA.bundle
        with pytest.raises(BrokerError) as refused:
            await client.fetch(web(one.url("127.0.0.1")), None)
        assert refused.value.reason == "endpoint_untrusted"


@pytest.mark.bears("FE-11")
async def test_nobody_is_asked_who_it_is(directory):
    async with side("other.test", directory, agent=False) as one:
        answer = await ask(one)
        assert answer.status_code == 200
        assert "www-authenticate" not in answer.headers


@pytest.mark.bears("FE-12")
async def test_a_get_gives_the_newest_bundle_as_json_in_utf_8(directory):
    async with side("other.test", directory, agent=False) as one:
        answer = await ask(one)
        assert answer.headers["content-type"] == "application/json"
        assert Bundle.parse(OTHER, answer.content.decode("utf-8")).sequence == (await one.bundle()).sequence_number
        assert json.loads(answer.content)["spiffe_refresh_hint"] == 300
        assert (await ask(one, "POST")).status_code == 405


@pytest.mark.bears("FE-13")
async def test_redirects_are_followed_to_endpoints_only_and_forgotten(client):
    def moving(line: str) -> bytes:
        return redirect("/moved", 307) if line.startswith("GET / ") else serving()(line)

    for identity, make, trust in ((CA.issue("/spire/server"), spiffe, CA.bundle), (WEB.issue("127.0.0.1"), web, None)):
        async with endpoint(identity, moving) as one:
            for _ in range(2):
                assert await client.fetch(make(one.url()), trust) == CA.bundle
            assert one.seen == ["GET / HTTP/1.1", "GET /moved HTTP/1.1"] * 2
        for bad in ("http://127.0.0.1/", "https://user@127.0.0.1/"):
            async with endpoint(identity, lambda line, bad=bad: redirect(bad)) as one:
                with pytest.raises(BrokerError) as refused:
                    await client.fetch(make(one.url()), trust)
                assert refused.value.reason == "redirect_refused"


@pytest.mark.bears("FE-14")
async def test_https_spiffe_takes_exactly_the_configured_identity(client, directory):
    for path in ("/spire/serve", "/spire/server/x", "/web"):
        async with endpoint(CA.issue(path), serving()) as one:
            with pytest.raises(InvalidSvid):
                await client.fetch(spiffe(one.url()), CA.bundle)
            assert one.seen == []
    async with endpoint(
        CA.issue("/spire/server", age=timedelta(hours=2), lifetime=-timedelta(hours=1)), serving()
    ) as one:
        with pytest.raises(BrokerError):
            await client.fetch(spiffe(one.url()), CA.bundle)
    # Our own endpoint shows a valid X.509-SVID.
    async with side("other.test", directory, agent=False) as one:
        bundle = Bundle.parse(OTHER, (await ask(one)).content)
        context = client_context(None, [root.public_bytes(Encoding.DER) for root in bundle.x509_authorities])
        _, writer = await asyncio.open_connection("127.0.0.1", one.running.bundle_port, ssl=context)
        peer = judge(writer.get_extra_info("ssl_object"), BundleSet.of(bundle), SystemClock().now())
        writer.transport.abort()
        assert isinstance(peer, SvidPeer)
        assert peer.svid.id == SERVER


@pytest.mark.bears("FE-15")
async def test_the_first_fetch_is_by_the_given_bundle_and_later_ones_by_the_stored(here):
    client = EndpointClient(SystemClock())
    new = Authority("other.test")
    both = Bundle(OTHER, (CA.certificate, new.certificate), sequence=2)
    fixture = Fixture(here)
    fixture.polling._fetch = client.fetch
    async with endpoint(CA.issue("/spire/server"), serving(both)) as one:
        (made,) = await here.relationships.create([Federation(spiffe(one.url()), _published(CA))], "op")
        assert isinstance(made, Federation)
        await fixture.polling.refresh(OTHER)
    # The endpoint's authority has changed: the bundle to begin with would not know it.
    async with endpoint(new.issue("/spire/server"), serving(both.with_sequence(3))) as one:
        moved = spiffe(one.url())
        await here.relationships.update([(OTHER, lambda current: Federation(moved))], "op")
        with pytest.raises(BrokerError):
            await client.fetch(moved, CA.bundle)
        await fixture.polling.refresh(OTHER)
    assert here.bundles.federated(OTHER).sequence == 3


@pytest.mark.bears("FE-16")
async def test_the_name_is_known_before_the_fetch(client):
    foreign = Authority("third.test").bundle
    async with endpoint(WEB.issue("127.0.0.1"), serving(foreign)) as one:
        # Whatever the certificates in it say of themselves: it is the bundle of the trust domain that was configured.
        assert (await client.fetch(web(one.url()), None)).trust_domain == OTHER
