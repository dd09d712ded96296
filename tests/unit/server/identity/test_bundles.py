"""Bundles as operators set them: words and codes of SPIRE, deletion modes, and what is appended to the own bundle."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.errors import Conflict, Invalid, InvalidBundle, NotFound
from broker.registry.entry import Entry
from broker.server.identity import bundles as bundles_module
from broker.server.identity.bundles import DeletionMode, PublishedBundle, PublishedKey
from broker.server.store import bundle_rows
from broker.server.store.bundle_rows import MAX_AUTHORITIES, x509_key
from broker.spiffe import TrustDomain
from tests.unit.server.authority.world import DOMAIN
from tests.unit.server.identity.world import world
from tests.unit.transport.pki import Authority

OTHER = TrustDomain("other.test")
AUTHORITY = Authority("other.test")


def spki(key=None) -> bytes:
    public = (key or ec.generate_private_key(ec.SECP256R1())).public_key()
    return public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def published(name="other.test", sequence=1, **fields) -> PublishedBundle:
    made = PublishedBundle.of(Authority(name).bundle.with_sequence(sequence))
    return PublishedBundle(
        **{
            "trust_domain": made.trust_domain,
            "x509": made.x509,
            "jwt": (PublishedKey("kid", spki()),),
            "sequence": sequence,
            "refresh_hint": 60,
        }
        | fields
    )


async def events(here) -> list[str]:
    rows = await here.store.read(lambda reader: reader.records(0, 1000))
    return [row.body.decode() for row in rows]


async def test_a_bundle_is_created_once_and_set_whenever(here):
    first, second = published(), published(sequence=1)
    assert await here.bundles.create([first], "op") == [first]
    (refused,) = await here.bundles.create([second], "op")
    assert isinstance(refused, Conflict)
    assert refused.message == "bundle already exists"
    # What an operator sets stands, whatever its number.
    older = published(sequence=0)
    assert await here.bundles.set([older], "op") == [older]
    assert here.bundles.federated(OTHER) == older
    assert here.bundles.count() == 2
    assert [one for one in await events(here) if "bundle_changed" in one][-1].count("other.test") == 2


async def test_an_update_needs_a_bundle(here):
    (refused,) = await here.bundles.update([published()], lambda held, sent: sent, "op")
    assert isinstance(refused, NotFound)
    assert refused.message == "bundle not found"
    await here.bundles.create([published()], "op")
    newer = published(sequence=9)
    assert await here.bundles.update([newer], lambda held, sent: sent, "op") == [newer]


async def test_each_item_has_its_own_outcome(here):
    own = published(DOMAIN.name)
    for act, doing in ((here.bundles.create, "creating"), (here.bundles.set, "setting")):
        refused, accepted, passed = await act([own, published(f"{doing}.test"), InvalidBundle("bad")], "op")
        assert refused.message == f"{doing} a federated bundle for the server's own trust domain is not allowed"
        assert accepted.trust_domain.name == f"{doing}.test"
        assert passed.message == "bad"


async def test_the_own_bundle_is_no_federated_one(here):
    with pytest.raises(Invalid):
        here.bundles.federated(DOMAIN)
    with pytest.raises(NotFound):
        here.bundles.federated(OTHER)
    (refused,) = await here.bundles.delete([DOMAIN], DeletionMode.DELETE, "op")
    assert refused.message == "removing the bundle for the server trust domain is not allowed"


async def test_pages_are_by_trust_domain(here):
    await here.bundles.set([published(f"{name}.test") for name in "cab"], "op")
    first = here.bundles.find(2)
    assert [one.trust_domain.name for one in first.items] == ["a.test", "b.test"]
    assert [one.trust_domain.name for one in here.bundles.find(2, first.next).items] == ["c.test"]
    assert here.bundles.find(2, first.next).next == ""


async def test_a_bundle_in_use_is_kept(here):
    await here.bundles.set([published()], "op")
    await here.add("/one", federates_with=frozenset({OTHER}))
    (refused,) = await here.bundles.delete([OTHER], DeletionMode.RESTRICT, "op")
    assert isinstance(refused, Conflict)
    assert refused.reason == "bundle_in_use"
    assert refused.message.endswith("cannot delete bundle; federated with 1 registration entries")
    assert here.bundles.federated(OTHER)


async def test_a_bundle_goes_with_its_entries(here):
    await here.bundles.set([published()], "op")
    await here.add("/one", federates_with=frozenset({OTHER}))
    await here.add("/two")
    assert await here.bundles.delete([OTHER], DeletionMode.DELETE, "op") == [None]
    assert [entry.id for entry in here.directory.entries()] == ["two"]
    assert here.bundles.count() == 1
    assert any("entry_deleted" in one for one in await events(here))


async def test_a_bundle_goes_out_of_its_entries(here):
    third = TrustDomain("third.test")
    await here.bundles.set([published(), published("third.test")], "op")
    await here.add("/one", federates_with=frozenset({OTHER, third}))
    assert await here.bundles.delete([OTHER], DeletionMode.DISSOCIATE, "op") == [None]
    entry = here.directory.entry("one")
    assert isinstance(entry, Entry)
    assert entry.federates_with == frozenset({third})
    assert entry.revision == 1
    (refused,) = await here.bundles.delete([OTHER], DeletionMode.DISSOCIATE, "op")
    assert isinstance(refused, NotFound)


async def test_what_nobody_could_verify_with_is_refused(here):
    long = tuple(PublishedKey(str(number), spki()) for number in range(MAX_AUTHORITIES + 1))
    for bad in (
        published(jwt=(PublishedKey("kid", spki(ed25519.Ed25519PrivateKey.generate())),)),
        published(jwt=(PublishedKey("kid", b"no key"),)),
        published(jwt=(PublishedKey("kid", spki()), PublishedKey("kid", spki()))),
        published(x509=(PublishedKey("", b"no certificate"),)),
        published(jwt=long),
        published(x509=tuple(PublishedKey("", AUTHORITY.certificate.public_bytes(Encoding.DER)) for _ in range(501))),
    ):
        (refused,) = await here.bundles.set([bad], "op")
        assert isinstance(refused, InvalidBundle), bad
    assert here.bundles.count() == 1


async def test_there_are_not_too_many(here, monkeypatch):
    monkeypatch.setattr(bundles_module, "MAX_FEDERATED", 1)
    first, second = await here.bundles.set([published(), published("third.test")], "op")
    assert isinstance(first, PublishedBundle)
    assert second.reason == "too_many_bundles"
    assert isinstance((await here.bundles.set([published(sequence=2)], "op"))[0], PublishedBundle)
    monkeypatch.setattr(bundles_module, "MAX_BATCH", 1)
    with pytest.raises(Invalid):
        await here.bundles.set([published(), published()], "op")


async def test_they_outlive_the_process(tmp_path):
    bundle = published()
    async with world(tmp_path) as here:
        await here.bundles.set([bundle], "op")
    async with world(tmp_path) as again:
        assert again.bundles.federated(OTHER) == bundle
        assert again.federated.trusted[OTHER].x509_authorities == bundle.checked().x509_authorities


def test_a_certificate_that_fits_into_no_document_is_refused():
    """Else the bundle endpoint could not write our bundle any more."""
    key = ec.generate_private_key(ec.SECP256K1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "odd")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    odd = (
        builder.serial_number(1)
        .not_valid_before(datetime(2026, 1, 1, tzinfo=UTC))
        .not_valid_after(datetime(2036, 1, 1, tzinfo=UTC))
        .sign(key, hashes.SHA256())
    )
    with pytest.raises(InvalidBundle):
        x509_key(odd.public_bytes(Encoding.DER))


def test_a_bundle_has_bounds(monkeypatch):
    monkeypatch.setattr(bundle_rows, "MAX_KEY_BYTES", 100)
    with pytest.raises(InvalidBundle):
        published().checked()


class TestAppended:
    async def test_authorities_are_published_and_sign_nothing(self, here):
        root = PublishedBundle.of(Authority("example.org").bundle).x509[0]
        rsa_key = spki(rsa.generate_private_key(65537, 2048))
        ends = here.clock.now() + timedelta(hours=2)
        before = here.bundles.own()
        signing = here.authorities.x509().id
        shown = await here.bundles.append([root], [PublishedKey("theirs", rsa_key, ends)], "op")
        assert shown.sequence == before.sequence + 1
        assert {key.public for key in shown.x509} == {root.public} | {key.public for key in before.x509}
        assert {key.id: key.not_after for key in shown.jwt}["theirs"] == ends
        assert here.authorities.x509().id == signing
        assert "theirs" in here.authorities.bundle.jwt_authorities

    async def test_the_same_again_changes_nothing(self, here):
        root = PublishedBundle.of(Authority("example.org").bundle).x509[0]
        once = await here.bundles.append([root], [], "op")
        assert await here.bundles.append([root], [], "op") == once

    async def test_without_an_end_they_stay(self, here):
        await here.bundles.append([], [PublishedKey("theirs", spki())], "op")
        here.clock.advance(timedelta(hours=20))
        await here.rotation.settle()
        shown = {key.id: key for key in here.bundles.own().jwt}
        assert shown["theirs"].not_after is None

    async def test_with_an_end_they_go(self, here):
        await here.bundles.append([], [PublishedKey("theirs", spki(), here.clock.now() + timedelta(hours=1))], "op")
        here.clock.advance(timedelta(hours=2))
        await here.rotation.settle()
        assert "theirs" not in {key.id for key in here.bundles.own().jwt}

    async def test_nothing_and_a_taken_key_id(self, here):
        with pytest.raises(Invalid) as refused:
            await here.bundles.append([], [], "op")
        assert refused.value.message == "no authorities to append"
        taken = here.bundles.own().jwt[0].id
        with pytest.raises(Invalid) as refused:
            await here.bundles.append([], [PublishedKey(taken, spki())], "op")
        assert refused.value.reason == "bundle_key_id"
