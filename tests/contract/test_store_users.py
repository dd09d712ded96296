"""Stops, users' sessions and standing delegations, and the tasks that hang on them."""

from dataclasses import replace

import pytest

from broker.errors import Conflict, Invalid
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import NewFrame
from broker.server.store.user_rows import LivingTasks, UserLease, UserSession
from broker.spiffe import SpiffeId
from broker.tasks import Authority, Cause, State, Task
from broker.tasks.standing import AgentPattern, StandingDelegation
from broker.tasks.stop import Stop, StopKind
from tests.unit.server.store.samples import AGENT, HOUR, NOW, SECOND, task

ISSUER = "https://idp.example.org"
STOP = Stop(
    kind=StopKind.USER, name="alice", source=ISSUER, not_before=NOW, cause=Cause.USER_DISABLED, changed_at=NOW,
    tokens_from=7, disabled=True, unfinished=True,
)  # fmt: skip
DELEGATION = StandingDelegation(
    id="dlg_1", issuer=ISSUER, user="alice", client="console", token_hash="sha-256:" + "A" * 43, auth_time=NOW,
    authority=Authority.parse([{"type": "api", "locations": ["https://a.example"], "actions": ["a.read"]}]),
    agents=(AgentPattern(str(AGENT)),), purpose="p", max_task_ttl=60, max_hops=2,
    created_at=NOW, expires_at=NOW + HOUR, session="s-1", acr="2",
)  # fmt: skip


def named(task_id: str, *, user: str = "alice", **given: str) -> Task:
    sample = task(task_id)
    return replace(sample, user=user, delegation=replace(sample.delegation, user=user, **given))


class TestStops:
    async def test_it_comes_back_as_it_was(self, store: Store) -> None:
        assert await store.write(lambda w: w.put_stop(STOP)) == STOP
        other = replace(STOP, source="operator", disabled=False, unfinished=False, tokens_from=0)
        await store.write(lambda w: w.put_stop(other))
        found = await store.read(lambda r: r.stops([(StopKind.USER, "alice"), (StopKind.SESSIONS, "alice")]))
        assert set(found) == {STOP, other}
        for nothing in ([], [(StopKind.USER, "Alice")], [(StopKind.SESSIONS, "alice")]):
            assert await store.read(lambda r, names=nothing: r.stops(names)) == ()

    async def test_of_one_source_the_furthest_counts(self, store: Store) -> None:
        later = replace(STOP, not_before=NOW + SECOND, tokens_from=3, disabled=False, unfinished=False)
        await store.write(lambda w: w.put_stop(STOP))
        summed = await store.write(lambda w: w.put_stop(later))
        assert summed == replace(later, tokens_from=7, disabled=True, unfinished=True)
        assert await store.write(lambda w: w.put_stop(STOP)) == replace(STOP, not_before=NOW + SECOND)

    async def test_it_is_lifted_and_still_counts_for_the_past(self, store: Store) -> None:
        await store.write(lambda w: w.put_stop(STOP))
        lifted = await store.write(lambda w: w.lift_stop(STOP, NOW + SECOND))
        assert lifted == replace(STOP, disabled=False, not_before=NOW + SECOND)
        assert (await store.write(lambda w: w.lift_stop(STOP, NOW))).not_before == NOW + SECOND

    async def test_what_is_unfinished_is_found_in_order(self, store: Store) -> None:
        second = replace(STOP, name="bob", changed_at=NOW + SECOND)
        await store.write(lambda w: (w.put_stop(second), w.put_stop(STOP)))
        assert await store.read(lambda r: r.unfinished_stops(10)) == (STOP, second)
        await store.write(lambda w: w.finish_stop(STOP))
        assert await store.read(lambda r: r.unfinished_stops(10)) == (second,)

    async def test_one_that_disables_nobody_is_forgotten_after_a_year(self, store: Store) -> None:
        over = replace(STOP, name="bob", disabled=False, unfinished=False)
        await store.write(lambda w: (w.put_stop(STOP), w.put_stop(over)))
        assert await store.write(lambda w: w.sweep(NOW + 364 * 24 * HOUR, 10)) == 0
        assert await store.write(lambda w: w.sweep(NOW + 366 * 24 * HOUR, 10)) == 1
        assert await store.read(lambda r: r.stops([(StopKind.USER, "alice")])) == (STOP,)


class TestSessions:
    async def test_its_times_only_grow(self, store: Store) -> None:
        seen = UserSession(ISSUER, "s-1", "alice", NOW, NOW)
        newer = replace(seen, confirmed_at=NOW + SECOND, seen_at=NOW + SECOND)
        await store.write(lambda w: [w.see_user_session(one) for one in (newer, seen, replace(seen, user="bob"))])
        assert await store.read(lambda r: r.user_sessions(ISSUER, "s-1")) == (newer, replace(seen, user="bob"))
        assert await store.read(lambda r: r.user_session(ISSUER, "s-1", "alice")) == newer
        assert await store.read(lambda r: r.user_session(ISSUER, "s-2", "alice")) is None
        assert await store.write(lambda w: w.sweep(NOW + 32 * 24 * HOUR, 10)) == 2

    async def test_it_is_found_by_what_became_of_its_lease(self, store: Store) -> None:
        sessions = [UserSession(ISSUER, f"s-{n}", "alice", NOW + n * SECOND, NOW) for n in range(4)]
        await store.write(lambda w: [w.see_user_session(one) for one in sessions])
        await store.write(lambda w: w.put_user_lease(sessions[0], UserLease.LAPSED))
        await store.write(lambda w: w.put_user_lease(sessions[2], UserLease.RETURNING))

        async def silent(until: int, limit: int = 10) -> list[str]:
            found = await store.read(lambda r: r.silent_user_sessions(ISSUER, NOW + until * SECOND, limit))
            return [one.sid for one in found]

        assert (await silent(2), await silent(2, 1), await silent(0)) == (["s-1", "s-2"], ["s-1"], [])
        returning = await store.read(lambda r: r.returning_user_sessions(ISSUER, NOW + SECOND, 10))
        assert returning == (replace(sessions[2], lease=UserLease.RETURNING),)
        assert await store.read(lambda r: r.returning_user_sessions(ISSUER, NOW + 2 * SECOND, 10)) == ()
        assert await store.read(lambda r: r.silent_user_sessions("https://other.example", NOW + HOUR, 10)) == ()
        # Its issuer speaks of it again: what was written of its tasks stays.
        await store.write(lambda w: w.see_user_session(replace(sessions[0], confirmed_at=NOW + HOUR)))
        found = await store.read(lambda r: r.user_session(ISSUER, "s-0", "alice"))
        assert found == replace(sessions[0], confirmed_at=NOW + HOUR, lease=UserLease.LAPSED)

    async def test_that_it_was_seen_again_counts_from_minute_to_minute(self, store: Store) -> None:
        seen = UserSession(ISSUER, "s-1", "alice", NOW, NOW)
        await store.write(lambda w: w.see_user_session(seen))
        for later, counts in ((59, False), (60, True), (61, False)):
            again = replace(seen, seen_at=NOW + later * SECOND)
            await store.write(lambda w, again=again: w.see_user_session(again))
            known = await store.read(lambda r: r.user_session(ISSUER, "s-1", "alice"))
            assert known is not None
            assert (known == again) is counts
        # Another word of its issuer counts at once.
        word = replace(seen, confirmed_at=NOW + SECOND, seen_at=NOW + 62 * SECOND)
        await store.write(lambda w: w.see_user_session(word))
        assert await store.read(lambda r: r.user_session(ISSUER, "s-1", "alice")) == word


class TestLivingTasks:
    async def test_they_are_found_by_what_they_hang_on(self, store: Store) -> None:
        mine = named("tsk_1", session="s%_1")
        other = named("tsk_2", session="s%_12")
        standing = named("tsk_3", standing="dlg_1")
        bobs = named("tsk_4", user="bob", session="s%_1")
        ended = replace(named("tsk_5", session="s%_1"), state=State.REVOKED, cause=Cause.OPERATOR, ended_at=NOW)
        await store.write(lambda w: [w.add_task(one) for one in (mine, other, standing, bobs, ended)])

        async def found(**wanted: object) -> set[str]:
            page = await store.read(lambda r: r.living_tasks(LivingTasks(**wanted), limit=10))  # type: ignore[arg-type]
            return {one.id for one in page.tasks}

        assert await found(user="alice") == {"tsk_1", "tsk_2", "tsk_3"}
        assert await found(user="alice", given=(("session", "s%_1"),)) == {"tsk_1"}
        assert await found(given=(("session", "S%_1"),)) == set()
        assert await found(given=(("session", 's%_1"'),)) == set()
        assert await found(user="alice", given=(("standing", "dlg_1"),)) == {"tsk_3"}
        assert await found(agent=mine.agent) == {"tsk_1", "tsk_2", "tsk_3", "tsk_4"}
        assert await found(agent=SpiffeId("spiffe://example.org/nobody")) == set()
        assert await found(user="alice", state=State.ACTIVE) == {"tsk_1", "tsk_2", "tsk_3"}
        assert await found(user="alice", state=State.SUSPENDED) == set()
        place = mine.authority.resources()[0].text
        assert await found(location=place) == {"tsk_1", "tsk_2", "tsk_3", "tsk_4"}
        assert await found(location="https://elsewhere.example") == set()
        low = replace(named("tsk_6", session="s%_1"), root="tsk_1", parent="tsk_1", depth=1)
        held = replace(named("tsk_7", session="s%_1"), state=State.SUSPENDED, cause=Cause.USER_UNCONFIRMED)
        await store.write(lambda w: [w.add_task(one) for one in (low, held)])
        mine_again = {"user": "alice", "given": (("session", "s%_1"),)}
        assert await found(**mine_again, roots=True) == {"tsk_1", "tsk_7"}
        assert await found(**mine_again, cause=Cause.USER_UNCONFIRMED) == {"tsk_7"}
        assert await found(**mine_again, cause=Cause.PAUSED) == set()
        with pytest.raises(Invalid):
            await found()

    async def test_they_come_page_by_page_also_while_they_end(self, store: Store) -> None:
        await store.write(lambda w: [w.add_task(named(f"tsk_{number}")) for number in range(5)])
        seen: list[str] = []
        after: str | None = None
        while True:
            page = await store.read(lambda r, at=after: r.living_tasks(LivingTasks(user="alice"), after=at, limit=2))
            seen += [one.id for one in page.tasks]
            await store.write(lambda w: w.end_tasks_of("alice", Cause.OPERATOR, NOW, 1))
            after = page.next
            if after is None:
                break
        assert len(seen) == len(set(seen))

    async def test_a_users_tasks_end_in_one_statement(self, store: Store) -> None:
        root = named("tsk_1")
        child = replace(root, id="tsk_2", parent="tsk_1", depth=1)
        overdue = replace(named("tsk_3"), created_at=NOW - 2 * HOUR, expires_at=NOW - HOUR)
        bobs = named("tsk_4", user="bob")
        await store.write(lambda w: [w.add_task(one) for one in (root, child, overdue, bobs)])

        def end(w: Writer) -> int:
            return w.end_tasks_of("alice", Cause.USER_DISABLED, NOW + SECOND, 10)

        for count, has in ((3, True), (4, False)):
            assert await store.read(lambda r, n=count: r.has_tasks("alice", n)) is has
        assert await store.write(end) == 3
        assert await store.write(end) == 0
        states = [await store.read(lambda r, one=one: r.task(one)) for one in ("tsk_1", "tsk_2", "tsk_3", "tsk_4")]
        assert [(one.state, one.cause, one.version) for one in states if one] == [
            (State.REVOKED, Cause.USER_DISABLED, 2),
            (State.CASCADED, Cause.PARENT_ENDED, 2),
            (State.EXPIRED, Cause.EXPIRED, 2),
            (State.ACTIVE, None, 1),
        ]


class TestDelegations:
    async def test_it_comes_back_as_it_was(self, store: Store) -> None:
        await store.write(lambda w: w.add_delegation(DELEGATION))
        assert await store.read(lambda r: r.delegation("dlg_1")) == DELEGATION
        assert await store.read(lambda r: r.delegation("dlg_2")) is None
        with pytest.raises(Conflict) as refused:
            await store.write(lambda w: w.add_delegation(DELEGATION))
        assert refused.value.reason == "delegation_exists"

    async def test_it_ends_once(self, store: Store) -> None:
        await store.write(lambda w: w.add_delegation(DELEGATION))
        ended = await store.write(lambda w: w.end_delegation("dlg_1", Cause.DELEGATION_WITHDRAWN, NOW + SECOND))
        assert ended == replace(DELEGATION, ended_at=NOW + SECOND, cause=Cause.DELEGATION_WITHDRAWN)
        assert await store.write(lambda w: w.end_delegation("dlg_1", Cause.OPERATOR, NOW + HOUR)) is None
        assert await store.read(lambda r: r.standing_of("alice")) == ()

    async def test_they_are_listed_by_age(self, store: Store) -> None:
        second = replace(DELEGATION, id="dlg_2", created_at=NOW + SECOND, session=None, acr=None)
        bobs = replace(DELEGATION, id="dlg_3", user="bob")
        await store.write(lambda w: [w.add_delegation(one) for one in (second, DELEGATION, bobs)])
        first = await store.read(lambda r: r.list_delegations("alice", limit=1))
        assert first.delegations == (DELEGATION,)
        rest = await store.read(lambda r: r.list_delegations("alice", after=first.next, limit=1))
        assert (rest.delegations, rest.next) == ((second,), None)
        assert len((await store.read(lambda r: r.list_delegations(None))).delegations) == 3
        assert await store.read(lambda r: r.standing_of("alice")) == (DELEGATION, second)
        with pytest.raises(Invalid):
            await store.read(lambda r: r.list_delegations(None, after="nonsense"))

    async def test_it_is_forgotten_a_day_after_its_end(self, store: Store) -> None:
        await store.write(lambda w: w.add_delegation(DELEGATION))
        assert await store.write(lambda w: w.sweep(NOW + 24 * HOUR, 10)) == 0
        assert await store.write(lambda w: w.sweep(NOW + 26 * HOUR, 10)) == 1


async def test_a_frame_says_whose_tokens_are_dead(store: Store) -> None:
    frame = NewFrame(kind="user", committed_at=1, forget_at=2, name="alice", sid="s-1", not_before=3)
    await store.write(lambda w: w.add_frame(frame))
    (kept,) = await store.read(lambda r: r.frames_since(0))
    assert (kept.kind, kept.name, kept.sid, kept.not_before) == ("user", "alice", "s-1", 3)
