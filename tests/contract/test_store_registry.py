"""Entries, nodes and join tokens."""

import asyncio

import pytest

from broker.errors import Conflict, NotFound, Refused
from broker.server.store.ports import Store
from broker.server.store.rows import JoinToken
from broker.spiffe import Selector, SpiffeId
from tests.contract.acts import BoomError, failing
from tests.unit.server.store.samples import (
    HOUR,
    NODE,
    NOW,
    SECOND,
    entry,
    full_entry,
    node,
)


class TestEntries:
    async def test_every_field_comes_back(self, store: Store) -> None:
        await store.write(lambda w: (w.add_entry(full_entry()), w.add_entry(entry("plain"))))
        assert await store.read(lambda r: r.entry("ent_full")) == full_entry()
        assert await store.read(lambda r: r.entry("ent_plain")) == entry("plain")
        assert await store.read(lambda r: r.entry("ent_none")) is None

    async def test_all_are_given_oldest_first(self, store: Store) -> None:
        young, old = entry("a", created_at=NOW + SECOND / 1000), entry("b")
        twin = entry("c")
        await store.write(lambda w: [w.add_entry(each) for each in (young, twin, old)])
        assert await store.read(lambda r: r.entries()) == (old, twin, young)

    async def test_no_two_have_one_id_or_are_similar(self, store: Store) -> None:
        await store.write(lambda w: w.add_entry(entry()))
        similar = entry(id="ent_other", selectors=frozenset(sorted(entry().selectors, reverse=True)), hint="x")
        for second in (entry(hint="x"), similar):
            with pytest.raises(Conflict) as conflict:
                await store.write(lambda w, second=second: w.add_entry(second))
            assert conflict.value.reason == "entry_exists"
        found = await store.read(lambda r: r.similar_entry(similar.spiffe_id, similar.parent_id, similar.selectors))
        assert found == entry()
        fewer = frozenset({Selector("unix:uid:1000")})
        assert await store.read(lambda r: r.similar_entry(similar.spiffe_id, NODE, fewer)) is None

    async def test_a_replacement_follows_the_revision_that_was_read(self, store: Store) -> None:
        await store.write(lambda w: (w.add_entry(entry()), w.add_entry(entry("other"))))
        newer = entry(hint="new", revision=1)
        await store.write(lambda w: w.replace_entry(newer))
        assert await store.read(lambda r: r.entry(newer.id)) == newer

        with pytest.raises(Conflict) as stale:
            await store.write(lambda w: w.replace_entry(entry(hint="lost", revision=1)))
        assert stale.value.reason == "stale_version"
        with pytest.raises(Conflict) as similar:
            await store.write(lambda w: w.replace_entry(entry("other", id=newer.id, revision=2)))
        assert similar.value.reason == "entry_exists"
        with pytest.raises(NotFound):
            await store.write(lambda w: w.replace_entry(entry("none", revision=1)))

    async def test_a_removed_one_is_given_back_once(self, store: Store) -> None:
        await store.write(lambda w: w.add_entry(entry()))
        assert await store.write(lambda w: w.remove_entry("ent_web")) == entry()
        assert await store.write(lambda w: w.remove_entry("ent_web")) is None
        await store.write(lambda w: w.add_entry(entry()))


class TestNodes:
    async def test_they_are_put_read_and_removed(self, store: Store) -> None:
        changed = node(
            serial="5",
            new_serial="6",
            banned=True,
            reattestable=True,
            agent_version="1.0",
            selectors=frozenset({Selector("x:1"), Selector("x:2")}),
            expires_at=NOW + 2 * HOUR,
        )
        other = node(id=SpiffeId("spiffe://example.org/spire/agent/join_token/m"))
        await store.write(lambda w: (w.put_node(node()), w.put_node(other), w.put_node(changed)))

        assert await store.read(lambda r: r.node(NODE)) == changed
        assert await store.read(lambda r: r.nodes()) == (other, changed)
        assert await store.write(lambda w: w.remove_node(NODE)) == changed
        assert await store.write(lambda w: w.remove_node(NODE)) is None

    @pytest.mark.bears("I11")
    async def test_a_join_token_admits_one_of_fifty(self, store: Store) -> None:
        await store.write(lambda w: w.add_join_token("h1", NODE, NOW + HOUR))
        takers = (store.write(lambda w: w.take_join_token("h1", NOW)) for _ in range(50))
        outcomes = await asyncio.gather(*takers, return_exceptions=True)

        assert outcomes.count(JoinToken("h1", NODE, NOW + HOUR)) == 1
        refused = [outcome for outcome in outcomes if isinstance(outcome, Refused)]
        assert len(refused) == 49
        assert {each.reason for each in refused} == {"join_token_unknown"}

    async def test_a_join_token_is_refused_when_expired_or_unknown_and_stays_when_the_act_fails(
        self, store: Store
    ) -> None:
        await store.write(lambda w: (w.add_join_token("h1", None, NOW + HOUR), w.add_join_token("h2", None, NOW)))
        for wanted in ("h2", "h3", "H1", "h", ""):
            with pytest.raises(Refused):
                await store.write(lambda w, wanted=wanted: w.take_join_token(wanted, NOW))
        with pytest.raises(BoomError):
            await store.write(failing(lambda w: w.take_join_token("h1", NOW)))
        with pytest.raises(Conflict):
            await store.write(lambda w: w.add_join_token("h1", None, NOW + HOUR))
        assert (await store.write(lambda w: w.take_join_token("h1", NOW))).agent_id is None
