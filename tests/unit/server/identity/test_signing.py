import asyncio
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from broker.errors import BrokerError, Invalid, NotFound, PolicyDenied, Unavailable
from broker.server.authority.csr import Wishes
from broker.server.identity import signing as module
from broker.server.identity.signing import MAX_AUDIENCES, MAX_BATCH, SignedX509, X509Request
from broker.spiffe import SpiffeId, jose, verify_jwt_svid, verify_x509_svid
from tests.unit.server.identity.world import AGENT, OTHER, csr, world

REQUEST = csr()


def wishes(name, *dns_names, subject=()):
    return Wishes(SpiffeId(name), dns_names, x509.Name([x509.NameAttribute(*one) for one in subject]))


async def bodies(here):
    return [record.body for record in await here.store.read(lambda reader: reader.records(0, 10_000))]


@pytest.mark.bears("I04")
async def test_only_own_entries_are_signed_for(here):
    await here.add_node()
    await here.add_node(OTHER)
    await here.add("/mine", x509_svid_ttl=60, hint="h")
    await here.add("/yours", OTHER)
    key = ec.generate_private_key(ec.SECP256R1())
    outcomes = await here.signing.x509(
        AGENT,
        [X509Request("mine", csr(key)), X509Request("yours", REQUEST), X509Request("none", REQUEST)],
    )
    svid = verify_x509_svid(outcomes[0].chain_der, here.authorities.bundles, now=here.clock.now())
    assert str(svid.id) == "spiffe://example.org/mine"
    assert svid.not_after == here.clock.now() + timedelta(seconds=60)
    assert svid.leaf.public_key() == key.public_key()
    assert outcomes[0].hint == "h"
    assert [type(outcome) for outcome in outcomes[1:]] == [NotFound, NotFound]
    # Nobody learns from the answer whether an entry of others is there.
    assert outcomes[1].message == outcomes[2].message


async def test_each_signature_is_recorded_first(here):
    await here.add_node()
    await here.add("/app")
    outcomes = await here.signing.x509(AGENT, [X509Request("app", REQUEST)] * 3)
    serials = {
        verify_x509_svid(one.chain_der, here.authorities.bundles, now=here.clock.now()).serial for one in outcomes
    }
    assert len(serials) == 3
    recorded = [body for body in await bodies(here) if b'"svid_issued"' in body]
    assert all(any(f"{serial:x}".encode() in body for body in recorded) for serial in serials)


async def test_nothing_leaves_when_the_record_cannot_be_written(here, monkeypatch):
    await here.add_node()
    await here.add("/app")

    async def full(act):
        raise Unavailable("the disk is full")

    monkeypatch.setattr(here.store, "write", full)
    with pytest.raises(Unavailable):
        await here.signing.x509(AGENT, [X509Request("app", REQUEST)])
    with pytest.raises(Unavailable):
        await here.signing.jwt(AGENT, "app", ["a"])


async def test_a_large_batch_keeps_its_order(here):
    await here.add_node()
    await here.add("/app")
    requests = [X509Request("app" if number % 3 else "none", REQUEST) for number in range(100)]
    outcomes = await here.signing.x509(AGENT, requests)
    assert [isinstance(outcome, SignedX509) for outcome in outcomes] == [bool(number % 3) for number in range(100)]
    with pytest.raises(Invalid):
        await here.signing.x509(AGENT, requests * (MAX_BATCH // 100 + 1))


async def test_an_ended_authority_signs_nothing(here):
    await here.add_node()
    await here.add("/app")
    here.clock.advance(timedelta(hours=25))
    (outcome,) = await here.signing.x509(AGENT, [X509Request("app", REQUEST)])
    assert isinstance(outcome, Unavailable)
    with pytest.raises(Unavailable):
        await here.signing.jwt(AGENT, "app", ["a"])


@pytest.mark.bears("I07")
async def test_near_its_end_an_authority_signs_for_shorter_and_that_is_said_once(here, monkeypatch):
    said = []

    class Log:
        def warning(self, event, **fields):
            said.append((event, fields["kind"], fields["authority"]))

    monkeypatch.setattr(module, "log", Log())
    await here.add_node()
    await here.add("/app", x509_svid_ttl=3600, jwt_svid_ttl=3600)
    (whole,) = await here.signing.x509(AGENT, [X509Request("app", REQUEST)])
    await here.signing.jwt(AGENT, "app", ["a"])
    assert whole.expires_at == here.clock.now() + timedelta(hours=1)
    assert said == []
    x509, jwt = here.authorities.x509(), here.authorities.jwt()
    here.clock.advance(timedelta(hours=23, minutes=50))
    for _ in range(3):
        (outcome,) = await here.signing.x509(AGENT, [X509Request("app", REQUEST)])
        assert outcome.expires_at == x509.issuer.validity.not_after < here.clock.now() + timedelta(minutes=11)
        token = await here.signing.jwt(AGENT, "app", ["a"])
        assert token.expires_at <= jwt.not_after
        await here.signing.mint_x509(wishes("spiffe://example.org/job"), REQUEST, timedelta(hours=1), "test")
    assert said == [("svid_shortened", "x509", x509.id), ("svid_shortened", "jwt", jwt.id)]


async def test_a_jwt_svid_is_for_the_entrys_audiences(here):
    await here.add_node()
    await here.add("/any")
    await here.add("/narrow", allowed_audiences=frozenset({"a", "b"}), jwt_svid_ttl=30)
    await here.signing.jwt(AGENT, "any", ["whatever"])
    svid = await here.signing.jwt(AGENT, "narrow", ["a", "b", "a"])
    token = verify_jwt_svid(svid.token, here.authorities.bundles, audience="a", now=here.clock.now())
    assert list(token.audience) == ["a", "b"]
    assert svid.expires_at == here.clock.now() + timedelta(seconds=30)
    for audience in (["a", "c"], ["c"], ["A"], ["*"]):
        with pytest.raises(PolicyDenied):
            await here.signing.jwt(AGENT, "narrow", audience)


async def test_the_default_audiences_are_for_entries_that_name_none(tmp_path):
    async with world(tmp_path, audiences=("here",)) as here:
        await here.add_node()
        await here.add("/plain")
        await here.add("/narrow", allowed_audiences=frozenset({"a"}))
        await here.signing.jwt(AGENT, "plain", ["here"])
        for entry_id, audience in (("plain", "a"), ("narrow", "here")):
            with pytest.raises(PolicyDenied):
                await here.signing.jwt(AGENT, entry_id, [audience])


@pytest.mark.parametrize("audience", [[], [""], [str(n) for n in range(MAX_AUDIENCES + 1)], ["x" * 5000]])
@pytest.mark.bears("JW-07")
async def test_an_audience_is_a_must(here, audience):
    await here.add_node()
    await here.add("/app")
    with pytest.raises(Invalid):
        await here.signing.jwt(AGENT, "app", audience)


async def test_a_jwt_svid_is_never_the_same_twice(here):
    await here.add_node()
    await here.add("/app")
    tokens = await asyncio.gather(*(here.signing.jwt(AGENT, "app", ["a"]) for _ in range(5)))
    ids = {jose.parse_compact(one.token).payload["jti"] for one in tokens}
    assert len(ids) == 5
    # The record has its hash, not the id, and not the token.
    recorded = b"".join(await bodies(here))
    assert not any(str(one).encode() in recorded for one in ids)


async def test_jwt_svids_are_for_own_entries(here):
    await here.add_node()
    await here.add_node(OTHER)
    await here.add("/yours", OTHER)
    for entry_id in ("yours", "none"):
        with pytest.raises(NotFound):
            await here.signing.jwt(AGENT, entry_id, ["a"])


@pytest.mark.bears("I04")
@pytest.mark.parametrize(
    "name",
    ["spiffe://example.org", "spiffe://example.org/spire/server", "spiffe://example.org/spire", "spiffe://o.org/a"],
)
async def test_reserved_and_foreign_ids_are_not_minted(here, name):
    with pytest.raises(Invalid):
        await here.signing.mint_x509(wishes(name), REQUEST, None, "test")
    with pytest.raises(Invalid):
        await here.signing.mint_jwt(SpiffeId(name), ["a"], None, "test")


@pytest.mark.parametrize(
    ("dns_names", "subject"),
    [
        ((), "CN=job,O=ACME,C=DE"),
        (("job.example",), "CN=job.example,O=ACME,C=DE"),
        (("a" * 63 + ".b",), "CN=job,O=ACME,C=DE"),
    ],
)
async def test_a_minted_svid_has_the_subject_of_its_request(here, dns_names, subject):
    asked = ((NameOID.COUNTRY_NAME, "DE"), (NameOID.ORGANIZATION_NAME, "ACME"), (NameOID.COMMON_NAME, "job"))
    minted = await here.signing.mint_x509(
        wishes("spiffe://example.org/job", *dns_names, subject=asked), REQUEST, None, "uid:0"
    )
    leaf = verify_x509_svid(minted.chain_der, here.authorities.bundles, now=here.clock.now()).leaf
    assert leaf.subject.rfc4514_string() == subject


async def test_an_operator_mints(here):
    job = SpiffeId("spiffe://example.org/job")
    minted = await here.signing.mint_x509(wishes(str(job), "job.example"), REQUEST, timedelta(seconds=5), "uid:0")
    assert minted.expires_at == here.clock.now() + timedelta(seconds=5)
    token = await here.signing.mint_jwt(job, ["a"], None, "uid:0")
    assert token.expires_at == here.clock.now() + timedelta(minutes=5)
    assert sum(b'"minted":true' in body for body in await bodies(here)) == 2
    # What is empty names nobody.
    some = await here.signing.mint_jwt(job, ["", "a"], None, "uid:0")
    assert jose.parse_compact(some.token).payload["aud"] == ["a"]
    with pytest.raises(Invalid, match="invalid JWT-SVID audience: cannot be empty"):
        await here.signing.mint_jwt(job, [""], None, "uid:0")
    assert not isinstance(token, BrokerError)
