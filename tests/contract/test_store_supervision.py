"""Who watches over tasks and whom they hang on, in every store."""

from dataclasses import replace

from broker.server.store.ports import Store
from broker.server.store.revocation_rows import IssuedSvid
from broker.server.store.rows import SessionLeaf
from broker.spiffe import SpiffeId, TrustDomain
from broker.tasks.causes import Cause
from broker.tasks.task import State, Supervision
from tests.unit.server.store.samples import AGENT, HOUR, NODE, NOW, SECOND, X5T, ended, entry, session, task, token

OTHER = SpiffeId("spiffe://example.org/spire/agent/join_token/n2")
SECOND_LEAF, THIRD_LEAF = "B" * 42 + "A", "C" * 42 + "A"


async def test_tasks_by_their_supervision_and_by_why_they_stand(store: Store) -> None:
    stopped = {"state": State.SUSPENDED, "version": 2}
    rows = (
        task("tsk_1"),
        task("tsk_2", supervision=Supervision.LEASE),
        task("tsk_3", supervision=Supervision.LEASE, cause=Cause.LEASE_LAPSED, **stopped),
        task("tsk_4", supervision=Supervision.ATTACHED, cause=Cause.LEASE_LAPSED, **stopped),
        task("tsk_5", supervision=Supervision.LEASE, cause=Cause.OPERATOR, **stopped),
        ended(task("tsk_6", supervision=Supervision.LEASE)),
    )
    await store.write(lambda w: [w.add_task(row) for row in rows])
    assert await store.read(lambda r: r.leased_tasks()) == ("tsk_2",)
    assert await store.read(lambda r: r.lapsed_tasks()) == ("tsk_3", "tsk_4")


async def test_tasks_by_their_agent_and_its_trust_domain(store: Store) -> None:
    theirs = [SpiffeId(text) for text in ("spiffe://b.test/a", "spiffe://b.test/z/z", "spiffe://b.test.evil/a")]
    rows = [
        task("tsk_1"),
        *(task(f"tsk_{number}", agent=one) for number, one in enumerate(theirs, 2)),
        ended(task("tsk_5", agent=theirs[0])),
    ]
    await store.write(lambda w: [w.add_task(row) for row in rows])
    assert await store.read(lambda r: r.tasks_of_agent(AGENT)) == (rows[0],)
    assert await store.read(lambda r: r.tasks_of_agent(theirs[0])) == (rows[1],)
    found = await store.read(lambda r: r.tasks_of_trust_domain(TrustDomain("b.test")))
    assert set(found) == {rows[1], rows[2]}
    assert await store.read(lambda r: r.tasks_of_trust_domain(TrustDomain("c.test"))) == ()


async def test_sessions_by_the_run_of_their_agent(store: Store) -> None:
    one, two = session("ws_1", run="run_1"), session("ws_2", run="run_2", x5t=SECOND_LEAF)
    old, other = session("ws_3", x5t=THIRD_LEAF), session("ws_4", agent=OTHER, run="run_1")
    await store.write(lambda w: [w.put_session(row) for row in (one, two, old, other)])
    assert await store.read(lambda r: r.session("ws_1")) == one
    assert await store.read(lambda r: r.agents_with_sessions()) == (NODE, OTHER)
    assert set(await store.read(lambda r: r.sessions_of_other_runs(NODE, "run_2"))) == {one, old}
    await store.write(lambda w: [w.end_session(name, NOW) for name in ("ws_1", "ws_3", "ws_4")])
    assert await store.read(lambda r: r.sessions_of_other_runs(NODE, "run_2")) == ()
    assert await store.read(lambda r: r.agents_with_sessions()) == (NODE,)


async def test_a_rotated_leaf_is_known_until_it_ends(store: Store) -> None:
    first = session(not_after=NOW + HOUR, serial="a")
    second = replace(first, x5t=SECOND_LEAF, not_after=NOW + 2 * HOUR, serial="b")
    third = replace(first, x5t=THIRD_LEAF, not_after=NOW + 3 * HOUR, serial="c")
    for row in (first, second, second, third):
        await store.write(lambda w, row=row: w.put_session(row))
    for leaf in (X5T, SECOND_LEAF, THIRD_LEAF):
        found = await store.read(lambda r, leaf=leaf: r.session_by_x5t(leaf))
        assert found is not None
        assert (found.id, found.x5t) == (first.id, THIRD_LEAF)
    leaves = [SessionLeaf(one.x5t, one.not_after, one.serial) for one in (third, second, first)]
    assert list(await store.read(lambda r: r.session_leaves(first.id, NOW))) == leaves
    assert list(await store.read(lambda r: r.session_leaves(first.id, NOW + HOUR))) == leaves[:2]
    assert await store.read(lambda r: r.session_leaves("none", NOW)) == ()
    await store.write(lambda w: w.sweep(NOW + HOUR + SECOND, 100))
    assert await store.read(lambda r: r.session_by_x5t(X5T)) is None
    assert await store.read(lambda r: r.session_by_x5t(SECOND_LEAF)) is not None


async def test_an_ended_session_is_still_found_by_an_earlier_leaf(store: Store) -> None:
    await store.write(lambda w: w.put_session(session()))
    await store.write(lambda w: w.put_session(session(x5t=SECOND_LEAF)))
    await store.write(lambda w: w.end_session("ws_1", NOW))
    found = await store.read(lambda r: r.session_by_x5t(X5T))
    assert found is not None
    assert found.ended_at == NOW


async def test_sessions_by_the_authority_of_a_leaf(store: Store) -> None:
    def svid(authority: str, serial: str) -> IssuedSvid:
        return IssuedSvid(authority, serial, AGENT, "ent_web", str(NODE), NOW + HOUR)

    await store.write(lambda w: w.add_issued(1, [svid("ca1", "a"), svid("ca1", "b")]))
    await store.write(lambda w: w.add_issued(2, [svid("ca2", "c")]))
    rotated = session("ws_1", serial="a", not_after=NOW + HOUR)
    for row in (
        rotated,
        replace(rotated, x5t=SECOND_LEAF, serial="c"),
        session("ws_2", serial="b", x5t=THIRD_LEAF),
        session("ws_3", serial="c"),
        session("ws_4"),
    ):
        await store.write(lambda w, row=row: w.put_session(row))
    found = await store.read(lambda r: r.sessions_signed_by("ca1", NOW))
    assert [one.id for one in found] == ["ws_1", "ws_2"]
    assert len(await store.read(lambda r: r.sessions_signed_by("ca2", NOW))) == 2
    assert await store.read(lambda r: r.sessions_signed_by("ca3", NOW)) == ()
    await store.write(lambda w: w.end_session("ws_2", NOW))
    assert [one.id for one in await store.read(lambda r: r.sessions_signed_by("ca1", NOW))] == ["ws_1"]
    # The old leaf has ended: nobody can use it.
    assert [one.id for one in await store.read(lambda r: r.sessions_signed_by("ca1", NOW + HOUR))] == []


async def test_entries_by_their_spiffe_id(store: Store) -> None:
    one, two = entry(), entry("two", spiffe_id=entry().spiffe_id, parent_id=OTHER, created_at=NOW + SECOND)
    await store.write(lambda w: [w.add_entry(row) for row in (two, one, entry("other"))])
    assert await store.read(lambda r: r.entries_of(one.spiffe_id)) == (one, two)
    assert await store.read(lambda r: r.entries_of(SpiffeId("spiffe://example.org/none"))) == ()


async def test_tokens_for_by_their_resource(store: Store) -> None:
    await store.write(lambda w: w.add_task(task()))
    rows = [
        token("jti_1"),
        token("jti_2"),
        token("jti_3", revoked_at=NOW),
        token("jti_4", resource="https://other.example"),
        token("jti_5", resource="https://old.example", expires_at=NOW),
    ]
    await store.write(lambda w: [w.add_token(row) for row in rows])
    first = rows[0].resource
    assert set(await store.read(lambda r: r.living_resources(NOW))) == {first, "https://other.example"}
    assert await store.read(lambda r: r.tokens_for(first, NOW, 10)) == (rows[0], rows[1])
    assert await store.read(lambda r: r.tokens_for(first, NOW, 1)) == (rows[0],)
