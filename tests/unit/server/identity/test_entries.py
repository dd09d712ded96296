from dataclasses import replace

import pytest

from broker.errors import Conflict, Invalid, NotFound
from broker.server.identity.entries import MAX_BATCH, Similar
from broker.server.identity.filters import EntryFilter
from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.federation import Profile, Relationship
from tests.unit.server.identity.test_bundles import published
from tests.unit.server.identity.world import AGENT, draft


async def test_every_item_of_a_batch_has_its_own_outcome(here):
    first = draft("/one", AGENT, here.clock)
    again = replace(first, id="another")
    taken = draft("/two", AGENT, here.clock, id="one")
    foreign = draft("/x", AGENT, here.clock)
    foreign = replace(foreign, spiffe_id=SpiffeId("spiffe://other.org/x"), parent_id=SpiffeId("spiffe://other.org/p"))
    last = draft("/last", AGENT, here.clock)
    nonsense = Invalid("nonsense")
    outcomes = await here.entries.create([first, again, taken, foreign, nonsense, last], "test")
    assert outcomes[0] == first
    assert outcomes[1] == Similar(first)
    assert isinstance(outcomes[2], Conflict)
    assert isinstance(outcomes[3], Invalid)
    assert outcomes[4] is nonsense
    assert outcomes[5] == last
    assert here.entries.count(EntryFilter()) == 2


async def test_an_update_raises_the_revision_and_keeps_what_it_does_not_name(here):
    created = await here.add("/one", hint="a", description="kept")
    (edited,) = await here.entries.update(
        [("one", lambda entry: replace(entry, hint="b", id="no", revision=9))], "test"
    )
    assert (edited.id, edited.hint, edited.description, edited.revision) == ("one", "b", "kept", 1)
    assert edited.created_at == created.created_at
    assert here.entries.get("one") == edited


async def test_an_update_may_not_make_two_of_one(here):
    await here.add("/one")
    await here.add("/two")
    one = SpiffeId("spiffe://example.org/one")
    outcomes = await here.entries.update(
        [("two", lambda entry: replace(entry, spiffe_id=one)), ("none", lambda entry: entry)], "test"
    )
    assert isinstance(outcomes[0], Conflict)
    assert isinstance(outcomes[1], NotFound)


async def test_an_update_that_is_not_valid_leaves_the_entry(here):
    created = await here.add("/one")
    (outcome,) = await here.entries.update([("one", lambda entry: replace(entry, hint="x" * 2000))], "test")
    assert isinstance(outcome, Invalid)
    assert here.entries.get("one") == created


async def test_an_update_leads_into_no_other_trust_domain(here):
    created = await here.add("/one")
    there = {"spiffe_id": SpiffeId("spiffe://other.org/one"), "parent_id": SpiffeId("spiffe://other.org/p")}
    (outcome,) = await here.entries.update([("one", lambda entry: replace(entry, **there))], "test")
    assert isinstance(outcome, Invalid)
    assert here.entries.get("one") == created


async def test_each_change_is_recorded_with_who_made_it(here):
    await here.add("/one")
    await here.entries.update([("one", lambda entry: replace(entry, hint="b"))], "uid:0")
    await here.entries.delete(["one", "none"], "uid:0")
    records = await here.store.read(lambda reader: reader.records(0, 100))
    bodies = [record.body for record in records]
    for event in (b'"entry_created"', b'"entry_updated"', b'"entry_deleted"'):
        assert sum(event in body for body in bodies) == 1
    assert sum(b'"uid:0"' in body for body in bodies) == 2


async def test_a_batch_has_an_end(here):
    with pytest.raises(Invalid):
        await here.entries.delete(["x"] * (MAX_BATCH + 1), "test")
    with pytest.raises(NotFound):
        here.entries.get("none")


OTHER = TrustDomain("other.test")


async def test_an_entry_federates_with_whom_something_is_known_of(here):
    entry = draft("/one", AGENT, here.clock, federates_with=frozenset({OTHER}))
    (refused,) = await here.entries.create([entry], "op")
    assert isinstance(refused, NotFound)
    assert refused.reason == "federated_bundle_not_found"
    assert refused.message == 'unable to find federated bundle "spiffe://other.test"'
    assert list(here.directory.entries()) == []
    # A relationship will bring the bundle.
    relationship = Relationship(OTHER, "https://other.test/bundle", Profile.HTTPS_WEB)
    await here.store.write(lambda writer: writer.add_relationship(relationship))
    assert await here.entries.create([entry], "op") == [entry]


async def test_an_update_adds_nobody_who_is_unknown_and_need_not_drop_who_has_become_so(here):
    await here.bundles.set([published()], "op")
    await here.add("/one", federates_with=frozenset({OTHER}))
    third = frozenset({OTHER, TrustDomain("third.test")})
    (refused,) = await here.entries.update([("one", lambda one: replace(one, federates_with=third))], "op")
    assert isinstance(refused, NotFound)
    assert "third.test" in refused.message
    await here.store.write(lambda writer: writer.remove_federated_bundle(OTHER))
    (kept,) = await here.entries.update([("one", lambda one: replace(one, hint="h"))], "op")
    assert (kept.hint, kept.federates_with) == ("h", frozenset({OTHER}))
