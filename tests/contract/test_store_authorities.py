"""Authorities and workload sessions."""

from dataclasses import replace

import pytest

from broker.errors import Conflict
from broker.server.store.ports import Store
from broker.server.store.rows import AuthorityKind, AuthorityState
from broker.spiffe import SpiffeId
from tests.unit.server.store.samples import (
    HOUR,
    NODE,
    NOW,
    SECOND,
    X5T,
    authority,
    session,
)


class TestAuthorities:
    async def test_they_are_put_listed_and_removed(self, store: Store) -> None:
        active = authority(state=AuthorityState.ACTIVE, tainted=True)
        old = authority("a0", not_before=NOW - HOUR, state=AuthorityState.OLD)
        task_key = authority(kind=AuthorityKind.TASK, not_before=NOW + HOUR, not_after=NOW + 2 * HOUR)
        await store.write(lambda w: [w.put_authority(row) for row in (authority(), active, old, task_key)])

        assert await store.read(lambda r: r.authorities()) == (old, active, task_key)
        assert await store.read(lambda r: r.authorities(AuthorityKind.TASK)) == (task_key,)
        assert await store.write(lambda w: w.remove_authority(AuthorityKind.X509, "a1")) == active
        assert await store.write(lambda w: w.remove_authority(AuthorityKind.JWT, "a1")) is None

    async def test_the_bundle_sequence_only_rises(self, store: Store) -> None:
        assert await store.read(lambda r: r.bundle_sequence()) == 0
        assert await store.write(lambda w: (w.bump_bundle_sequence(), w.bump_bundle_sequence())) == (1, 2)
        assert await store.read(lambda r: r.bundle_sequence()) == 2


class TestSessions:
    async def test_a_renewal_keeps_the_start_and_moves_the_leaf(self, store: Store) -> None:
        renewed = session(x5t="B" * 43, not_after=NOW + 2 * HOUR, started_at=NOW + SECOND)
        await store.write(lambda w: (w.put_session(session()), w.put_session(renewed)))

        expected = replace(renewed, started_at=NOW)
        assert await store.read(lambda r: r.session("ws_1")) == expected
        assert await store.read(lambda r: r.session_by_x5t("B" * 43)) == expected
        # A process may still show the earlier one, for as long as it is valid.
        assert await store.read(lambda r: r.session_by_x5t(X5T)) == expected
        assert await store.read(lambda r: r.session_by_x5t("C" * 43)) is None

    async def test_it_belongs_to_who_came_first_with_it(self, store: Store) -> None:
        await store.write(lambda w: w.put_session(session()))
        thieves = (
            session(agent=SpiffeId("spiffe://example.org/spire/agent/join_token/n2")),
            session(spiffe_id=SpiffeId("spiffe://example.org/other")),
            session(entry_id="ent_other"),
        )
        for thief in thieves:
            with pytest.raises(Conflict) as taken:
                await store.write(lambda w, thief=thief: w.put_session(thief))
            assert taken.value.reason == "session_taken"
        assert await store.read(lambda r: r.session("ws_1")) == session()

    async def test_it_ends_once_and_never_comes_back(self, store: Store) -> None:
        await store.write(lambda w: w.put_session(session()))
        ended = replace(session(), ended_at=NOW + SECOND)
        assert await store.write(lambda w: w.end_session("ws_1", NOW + SECOND)) == ended
        assert await store.write(lambda w: w.end_session("ws_1", NOW + HOUR)) is None
        assert await store.write(lambda w: w.end_session("ws_2", NOW)) is None
        with pytest.raises(Conflict) as over:
            await store.write(lambda w: w.put_session(session()))
        assert over.value.reason == "session_ended"
        assert await store.read(lambda r: r.session("ws_1")) == ended

    async def test_a_shared_leaf_names_the_youngest_living_session(self, store: Store) -> None:
        rows = (
            session("ws_1", started_at=NOW + 3 * SECOND, ended_at=NOW + 4 * SECOND),
            session("ws_2", started_at=NOW),
            session("ws_3", started_at=NOW + SECOND),
        )
        await store.write(lambda w: [w.put_session(row) for row in rows])
        assert await store.read(lambda r: r.session_by_x5t(X5T)) == rows[2]
        await store.write(lambda w: (w.end_session("ws_2", NOW), w.end_session("ws_3", NOW)))
        assert (await store.read(lambda r: r.session_by_x5t(X5T))) == rows[0]

    async def test_the_living_of_an_agent_and_of_an_entry(self, store: Store) -> None:
        other = SpiffeId("spiffe://example.org/spire/agent/join_token/n2")
        rows = (session("ws_1"), session("ws_2", agent=other), session("ws_3", entry_id="ent_x"), session("ws_4"))
        await store.write(lambda w: [w.put_session(row) for row in rows])
        await store.write(lambda w: w.end_session("ws_4", NOW))
        assert await store.read(lambda r: r.sessions_of_agent(NODE)) == (rows[0], rows[2])
        assert await store.read(lambda r: r.sessions_of_entry("ent_web")) == (rows[0], rows[1])
