"""Federation relationships: words and codes of SPIRE, and that a bundle does not outlive its relationship."""

from dataclasses import replace

import pytest

from broker.errors import Conflict, Invalid, NotFound
from broker.server.identity import relationships as module
from broker.server.identity.federated import Federated, relationship_of, relationship_text
from broker.server.identity.relationships import Federation, Relationships
from broker.spiffe import TrustDomain
from broker.spiffe.federation import Profile
from tests.unit.server.authority.world import DOMAIN
from tests.unit.server.identity.test_bundles import events, published
from tests.unit.server.identity.world import world
from tests.unit.server.store.samples import relationship

OTHER = TrustDomain("other.test")


def test_the_text_of_a_change_is_read_back():
    for one in (relationship(), relationship(profile=Profile.HTTPS_WEB, endpoint_id=None)):
        assert relationship_of(OTHER, relationship_text(one)) == one


async def test_create_show_and_list(here):
    bundle = published()
    made = await here.relationships.create(
        [Federation(relationship(), bundle), Federation(relationship("a.test"))], "op"
    )
    assert made == [Federation(relationship(), bundle), Federation(relationship("a.test"))]
    assert here.relationships.get(OTHER) == Federation(relationship(), bundle)
    assert here.bundles.federated(OTHER) == bundle
    page = here.relationships.find(1)
    assert [one.relationship.trust_domain.name for one in page.items] == ["a.test"]
    assert here.relationships.find(1, page.next).items == [Federation(relationship(), bundle)]
    assert sum("relationship_created" in one for one in await events(here)) == 2


async def test_what_is_refused(here):
    first, again, own, bad = await here.relationships.create(
        [
            Federation(relationship()),
            Federation(relationship(), published()),
            Federation(relationship(DOMAIN.name)),
            Invalid("bad"),
        ],
        "op",
    )
    assert isinstance(first, Federation)
    assert isinstance(again, Conflict)
    assert own.message == "unable to create federation relationship for server trust domain"
    assert bad.message == "bad"
    # The second one's bundle was not taken either.
    with pytest.raises(NotFound):
        here.bundles.federated(OTHER)
    with pytest.raises(NotFound) as missing:
        here.relationships.get(TrustDomain("third.test"))
    assert missing.value.message == "federation relationship does not exist"


async def test_update(here):
    bundle = published()
    await here.relationships.create([Federation(relationship(), bundle)], "op")
    moved = relationship(url="https://moved.test/")
    kept, missing, bad = await here.relationships.update(
        [
            (OTHER, lambda current: replace(current, relationship=moved)),
            (TrustDomain("third.test"), lambda current: current),
            Invalid("bad"),
        ],
        "op",
    )
    assert kept == Federation(moved, bundle)
    assert isinstance(missing, NotFound)
    assert bad.message == "bad"
    other = published(sequence=0)
    assert await here.relationships.update([(OTHER, lambda current: Federation(moved, other))], "op") == [
        Federation(moved, other)
    ]
    assert here.federated.relationships == {OTHER: moved}


@pytest.mark.bears("X05")
async def test_with_the_relationship_goes_its_bundle(here):
    await here.relationships.create([Federation(relationship(), published())], "op")
    assert OTHER in here.federated.trusted
    deleted, missing, bad = await here.relationships.delete([OTHER, TrustDomain("third.test"), Invalid("bad")], "op")
    assert deleted == OTHER
    assert missing.message == "federation relationship not found"
    assert bad.message == "bad"
    assert OTHER not in here.federated.trusted
    with pytest.raises(NotFound):
        here.bundles.federated(OTHER)
    told = await events(here)
    assert any("relationship_deleted" in one for one in told)
    assert any("bundle_deleted" in one for one in told)


async def test_the_settings_stand_before_the_store(here):
    configured = relationship(url="https://configured.test/")
    federated = Federated(here.authorities, [configured])
    await federated.load(here.store)
    cases = Relationships(here.store, federated, here.clock, DOMAIN)
    await cases.create([Federation(relationship(), published())], "op")
    assert federated.relationships == {OTHER: configured}
    # As in SPIRE, what the settings say is not shown, and not ended by command: its bundle stays.
    assert cases.get(OTHER).relationship == relationship()
    await cases.delete([OTHER], "op")
    assert federated.relationships == {OTHER: configured}
    assert OTHER in federated.trusted


async def test_there_are_not_too_many(here, monkeypatch):
    monkeypatch.setattr(module, "MAX_RELATIONSHIPS", 1)
    _, refused = await here.relationships.create([Federation(relationship()), Federation(relationship("a.test"))], "op")
    assert refused.reason == "too_many_relationships"
    monkeypatch.setattr(module, "MAX_BATCH", 1)
    with pytest.raises(Invalid):
        await here.relationships.delete([OTHER, OTHER], "op")


async def test_they_outlive_the_process(tmp_path):
    async with world(tmp_path) as here:
        await here.relationships.create([Federation(relationship())], "op")
    async with world(tmp_path) as again:
        assert again.federated.relationships == {OTHER: relationship()}


@pytest.mark.bears("FE-04")
async def test_bundles_stay_apart(here):
    await here.bundles.set([published(), published("third.test")], "op")
    trusted = here.federated.trusted
    assert set(trusted) == {DOMAIN, OTHER, TrustDomain("third.test")}
    assert all(bundle.trust_domain == name for name, bundle in trusted.items())
    assert trusted[DOMAIN] == here.authorities.bundle
