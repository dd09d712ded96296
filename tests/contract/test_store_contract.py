"""What every adapter of the store must do, asked through the port alone. A new adapter is one more line in ADAPTERS."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from pathlib import Path

import pytest

from broker.audit.chain import GENESIS
from broker.audit.verify import verify_chain
from broker.errors import Conflict, Invalid, NotFound, Refused
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import AuthorityKind, AuthorityState, Change, FrameRow, JoinToken, TaskFilter
from broker.server.store.sqlite import SqliteStore
from broker.spiffe import Selector, SpiffeId
from broker.tasks.causes import Cause
from broker.tasks.task import State, Task
from tests.unit.server.store.samples import (
    AGENT,
    HOUR,
    NODE,
    NOW,
    SECOND,
    X5T,
    authority,
    entry,
    frame,
    full_entry,
    node,
    record,
    session,
    task,
    token,
)

Opener = Callable[[], AbstractAsyncContextManager[Store]]

ADAPTERS: dict[str, Callable[[Path], AbstractAsyncContextManager[Store]]] = {
    "sqlite": lambda directory: SqliteStore.open(directory / "broker.db"),
    "postgres": None,
}


@pytest.fixture(params=sorted(ADAPTERS))
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    if request.param == "postgres":
        url = request.getfixturevalue("postgresql")
        from broker.server.store.postgres import PostgresStore
        return lambda: PostgresStore.open(url)
    return lambda: ADAPTERS[request.param](tmp_path)


@pytest.fixture
async def store(opener: Opener) -> AsyncIterator[Store]:
    async with opener() as opened:
        yield opened


class BoomError(Exception):
    """What an act of a test raises."""


def failing(*steps: Callable[[Writer], object]) -> Callable[[Writer], None]:
    def act(w: Writer) -> None:
        for step in steps:
            step(w)
        raise BoomError

    return act


class TestActs:
    async def test_a_write_gives_what_the_act_returned_and_a_read_sees_it(self, store: Store) -> None:
        def act(w: Writer) -> str:
            w.put_node(node())
            assert w.node(NODE) == node()
            return "done"

        assert await store.write(act) == "done"
        assert await store.read(lambda r: r.node(NODE)) == node()

    async def test_an_act_that_raises_leaves_nothing_and_the_others_of_its_group_stay(self, store: Store) -> None:
        outcomes = await asyncio.gather(
            store.write(lambda w: w.add_entry(entry("a"))),
            store.write(failing(lambda w: w.add_entry(entry("b")), lambda w: w.change("entry", "b", "{}"))),
            store.write(lambda w: w.add_entry(entry("c"))),
            return_exceptions=True,
        )

        assert [type(outcome) for outcome in outcomes] == [type(None), BoomError, type(None)]
        assert [each.id for each in await store.read(lambda r: r.entries())] == ["ent_a", "ent_c"]
        assert await store.read(lambda r: r.change_head()) == 0

    async def test_acts_run_alone_and_in_the_order_in_which_they_came(self, store: Store) -> None:
        order: list[int] = []
        inside: set[int] = set()

        def act(number: int) -> Callable[[Writer], None]:
            def run(w: Writer) -> None:
                assert not inside
                inside.add(number)
                w.change("n", str(number), "")
                order.append(number)
                inside.remove(number)

            return run

        await asyncio.gather(*(store.write(act(number)) for number in range(300)))

        assert order == list(range(300))

    async def test_a_refusal_of_the_rules_reaches_the_caller_as_it_was_raised(self, store: Store) -> None:
        def act(w: Writer) -> None:
            raise Refused("no", code="task_ended", hint="start a new one")

        with pytest.raises(Refused) as refused:
            await store.write(act)
        assert (refused.value.reason, refused.value.hint) == ("task_ended", "start a new one")

    async def test_even_stop_iteration_is_an_error_of_its_caller_only(self, store: Store) -> None:
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(store.write(lambda _: next(iter(()))), 5)
        assert await store.write(lambda _: 1) == 1

    async def test_a_caller_who_gives_up_does_not_disturb_the_others(self, store: Store) -> None:
        given_up = asyncio.ensure_future(store.write(lambda w: w.change("k", "a", "")))
        kept = asyncio.ensure_future(store.write(lambda w: w.change("k", "b", "")))
        await asyncio.sleep(0)
        given_up.cancel()

        await kept
        assert given_up.cancelled()
        # Unknown to who gave up: the act took place wholly, or not at all.
        changes = await store.read(lambda r: r.changes_since(0, 10))
        assert changes is not None
        assert [c.key for c in changes] in (["b"], ["a", "b"])

    async def test_a_read_sees_one_snapshot_and_never_waits_for_a_write(self, store: Store) -> None:
        entered, go_on = threading.Event(), threading.Event()
        await store.write(lambda w: w.change("k", "1", ""))

        def query(r: object) -> tuple[int, int]:
            before = r.change_head()  # type: ignore[attr-defined]
            entered.set()
            go_on.wait(10)
            return before, r.change_head()  # type: ignore[attr-defined]

        reading = asyncio.ensure_future(store.read(query))
        await asyncio.to_thread(entered.wait, 10)
        await store.write(lambda w: w.change("k", "2", ""))
        go_on.set()

        assert await reading == (1, 1)
        assert await store.read(lambda r: r.change_head()) == 2

    async def test_everything_stays_after_closing_and_opening(self, opener: Opener) -> None:
        async with opener() as first:
            await first.write(lambda w: (w.add_entry(full_entry()), w.change("entry", "x", "{}"), w.record(record())))
            name, head = first.id, first.head
        async with opener() as second:
            assert (second.id, second.head) == (name, head) == (name, 1)
            assert await second.read(lambda r: r.entries()) == (full_entry(),)
            assert await second.write(lambda w: w.change("entry", "y", "{}")) == 2
            assert await second.write(lambda w: w.record(record())) == 2

    async def test_check_is_content_with_a_store_that_works(self, store: Store) -> None:
        await store.check()


class TestChanges:
    async def test_they_are_numbered_without_gaps_and_told_in_order_before_the_write_returns(
        self, store: Store
    ) -> None:
        told: list[Change] = []
        threads: set[int] = set()

        def hear(changes: Sequence[Change]) -> None:
            told.extend(changes)
            threads.add(threading.get_ident())

        store.subscribe(hear)

        async def write(number: int) -> None:
            act = (
                failing(lambda w: w.change("k", "no", "")) if number % 3 == 0 else lambda w: w.change("k", "yes", "{}")
            )
            try:
                seq = await store.write(act)
            except BoomError:
                return
            assert store.head >= seq
            assert any(change.seq == seq for change in told)

        await asyncio.gather(*(write(number) for number in range(200)))

        assert [change.seq for change in told] == list(range(1, len(told) + 1))
        assert {change.key for change in told} == {"yes"}
        assert await store.read(lambda r: r.changes_since(0, 1000)) == tuple(told)
        assert store.head == len(told)
        assert threads == {threading.get_ident()}

    async def test_a_subscription_ends(self, store: Store) -> None:
        told: list[Change] = []
        end = store.subscribe(told.extend)
        end()
        end()
        await store.write(lambda w: w.change("k", "a", ""))
        assert told == []

    async def test_a_subscriber_that_fails_does_not_reach_the_writer_or_the_others(self, store: Store) -> None:
        reported: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context["exception"]))
        told: list[Change] = []

        def fail(_: Sequence[Change]) -> None:
            raise BoomError

        store.subscribe(fail)
        store.subscribe(told.extend)

        assert await store.write(lambda w: w.change("k", "a", "")) == 1
        assert len(told) == 1
        assert isinstance(reported[0], BoomError)

    async def test_a_cursor_is_resumed_or_refused(self, store: Store) -> None:
        assert await store.read(lambda r: r.changes_since(0, 10)) == ()
        await store.write(lambda w: [w.change("k", str(n), "") for n in range(5)])

        page = await store.read(lambda r: r.changes_since(2, 2))
        assert page is not None
        assert [change.seq for change in page] == [3, 4]
        assert await store.read(lambda r: r.changes_since(5, 10)) == ()
        # A number that we never gave is another history's: a restored backup must not be resumed.
        assert await store.read(lambda r: r.changes_since(6, 10)) is None
        assert await store.read(lambda r: r.changes_since(-1, 10)) is None


class TestAudit:
    async def test_the_chain_holds_whatever_failed_in_between(self, store: Store) -> None:
        acts = [
            failing(lambda w: w.record(record("lost"))) if number % 4 == 1 else lambda w: w.record(record("kept"))
            for number in range(100)
        ]
        await asyncio.gather(*(store.write(act) for act in acts), return_exceptions=True)

        rows = await store.read(lambda r: r.records(0, 1000))
        head = await store.read(lambda r: r.chain_head())
        assert verify_chain(rows, expect=head) == head
        assert head.seq == len(rows) == 75
        assert not any(b"lost" in row.body for row in rows)

    async def test_it_starts_empty_and_is_read_in_pages(self, store: Store) -> None:
        assert await store.read(lambda r: r.chain_head()) == GENESIS
        await store.write(lambda w: [w.record(record(f"s{n}")) for n in range(5)])
        assert [row.seq for row in await store.read(lambda r: r.records(2, 2))] == [3, 4]


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
        assert await store.read(lambda r: r.session_by_x5t(X5T)) is None

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


def ended(of: Task, state: State = State.COMPLETED, cause: Cause = Cause.COMPLETED) -> Task:
    return replace(of, state=state, cause=cause, ended_at=NOW + SECOND, version=of.version + 1)


class TestTasks:
    async def test_every_field_comes_back(self, store: Store) -> None:
        root = task(session=None)
        child = task("tsk_2", parent=root, purpose="ünïcode ' \" purpose", epoch=3, version=9)
        await store.write(lambda w: (w.add_task(root), w.add_task(child), w.add_task(task("tsk_3"))))
        await store.write(lambda w: w.replace_task(ended(child), 9))
        assert await store.read(lambda r: r.task("tsk_1")) == root
        assert await store.read(lambda r: r.task("tsk_2")) == ended(child)
        assert await store.read(lambda r: r.task("none")) is None

    async def test_a_task_of_less_than_a_second_comes_back(self, store: Store) -> None:
        short = task(expires_at=NOW + SECOND / 1000)
        await store.write(lambda w: w.add_task(short))
        assert await store.read(lambda r: r.task("tsk_1")) == short

    async def test_of_two_who_read_the_same_version_one_writes(self, store: Store) -> None:
        await store.write(lambda w: w.add_task(task()))
        outcomes = await asyncio.gather(
            store.write(lambda w: w.replace_task(ended(task()), 1)),
            store.write(lambda w: w.replace_task(ended(task(), State.REVOKED, Cause.OPERATOR), 1)),
            return_exceptions=True,
        )
        assert outcomes[0] is None
        assert isinstance(outcomes[1], Conflict)
        assert outcomes[1].reason == "stale_version"
        assert await store.read(lambda r: r.task("tsk_1")) == ended(task())
        with pytest.raises(NotFound):
            await store.write(lambda w: w.replace_task(ended(task("none")), 1))

    async def test_what_a_failed_act_wrote_is_not_read_by_the_next(self, store: Store) -> None:
        await store.write(lambda w: w.add_task(task()))
        lost = ended(task(), State.REVOKED, Cause.OPERATOR)
        seen: list[Task | None] = []

        def check(w: Writer) -> None:
            seen.append(w.task("tsk_1"))
            w.replace_task(ended(task()), 1)
            seen.append(w.task("tsk_1"))

        await asyncio.gather(
            store.write(failing(lambda w: w.replace_task(lost, 1), lambda w: seen.append(w.task("tsk_1")))),
            store.write(check),
            return_exceptions=True,
        )
        assert seen == [lost, task(), ended(task())]

    async def test_place_and_person_are_written_once(self, store: Store) -> None:
        await store.write(lambda w: w.add_task(task()))
        forged = replace(ended(task()), agent=SpiffeId("spiffe://example.org/evil"), purpose="other")
        await store.write(lambda w: w.replace_task(forged, 1))
        assert await store.read(lambda r: r.task("tsk_1")) == ended(task())

    async def test_a_write_without_a_higher_version_is_a_defect(self, store: Store) -> None:
        await store.write(lambda w: w.add_task(task()))
        with pytest.raises(ValueError, match="higher version"):
            await store.write(lambda w: w.replace_task(task(), 1))

    async def test_a_parent_must_be_there_and_an_id_is_taken_once(self, store: Store) -> None:
        with pytest.raises(NotFound):
            await store.write(lambda w: w.add_task(task("tsk_2", parent=task())))
        await store.write(lambda w: w.add_task(task()))
        with pytest.raises(Conflict) as conflict:
            await store.write(lambda w: w.add_task(task()))
        assert conflict.value.reason == "task_exists"

    async def test_lineage_goes_up_and_subtree_goes_down(self, store: Store) -> None:
        root = task()
        left, right = task("tsk_l", parent=root), task("tsk_r", parent=root)
        leaf = task("tsk_x", parent=left)
        await store.write(lambda w: [w.add_task(each) for each in (root, right, left, leaf, task("tsk_other"))])

        assert await store.read(lambda r: r.lineage("tsk_x")) == (root, left, leaf)
        assert await store.read(lambda r: r.subtree("tsk_1")) == (root, left, right, leaf)
        assert await store.read(lambda r: r.subtree("tsk_l")) == (left, leaf)
        assert await store.read(lambda r: (r.lineage("none"), r.subtree("none"))) == ((), ())

    async def test_a_cascade_ends_every_living_descendant_and_nothing_else(self, store: Store) -> None:
        root = task()
        living = task("tsk_l", parent=root)
        overdue = task("tsk_o", parent=root, expires_at=NOW + SECOND)
        late = task("tsk_n", parent=living, created_at=NOW + 2 * HOUR, expires_at=NOW + 3 * HOUR)
        done = task("tsk_d", parent=root)
        other = task("tsk_other")
        await store.write(lambda w: [w.add_task(each) for each in (root, living, overdue, late, done, other)])
        await store.write(lambda w: w.replace_task(ended(done), 1))

        at = NOW + 2 * SECOND
        assert await store.write(lambda w: w.cascade("tsk_1", Cause.PARENT_ENDED, at)) == 3
        cascaded = {"state": State.CASCADED, "cause": Cause.PARENT_ENDED, "version": 2}
        assert await store.read(lambda r: r.task("tsk_l")) == replace(living, ended_at=at, **cascaded)
        assert await store.read(lambda r: r.task("tsk_n")) == replace(late, ended_at=NOW + 2 * HOUR, **cascaded)
        expired = replace(overdue, state=State.EXPIRED, cause=Cause.EXPIRED, version=2, ended_at=overdue.expires_at)
        assert await store.read(lambda r: r.task("tsk_o")) == expired
        assert await store.read(lambda r: (r.task("tsk_1"), r.task("tsk_d"), r.task("tsk_other"))) == (
            root,
            ended(done),
            other,
        )
        assert await store.write(lambda w: w.cascade("tsk_1", Cause.PARENT_ENDED, at)) == 0

    async def test_a_cascade_from_the_middle_leaves_the_rest_of_the_tree(self, store: Store) -> None:
        root = task()
        left, right = task("tsk_l", parent=root), task("tsk_r", parent=root)
        leaf = task("tsk_x", parent=left)
        await store.write(lambda w: [w.add_task(each) for each in (root, left, right, leaf)])
        assert await store.write(lambda w: w.cascade("tsk_l", Cause.PARENT_ENDED, NOW + SECOND)) == 1
        living = await store.read(lambda r: r.list_tasks(TaskFilter(live=True)))
        assert {each.id for each in living.tasks} == {"tsk_1", "tsk_l", "tsk_r"}

    async def test_the_tasks_of_a_session_are_its_living_ones(self, store: Store) -> None:
        mine, over, other = task(), task("tsk_2"), task("tsk_3", session="ws_2")
        await store.write(lambda w: [w.add_task(each) for each in (mine, over, other)])
        await store.write(lambda w: w.replace_task(ended(over), 1))
        assert await store.read(lambda r: r.tasks_of_session("ws_1")) == (mine,)

    async def test_the_overdue_are_found_longest_first(self, store: Store) -> None:
        late, later, ended_one = (
            task("tsk_1", expires_at=NOW + 2 * SECOND),
            task("tsk_2", expires_at=NOW + SECOND),
            task("tsk_3", expires_at=NOW + SECOND),
        )
        await store.write(lambda w: [w.add_task(each) for each in (late, later, ended_one, task("tsk_4"))])
        await store.write(lambda w: w.replace_task(ended(ended_one), 1))
        at = late.expires_at
        assert await store.read(lambda r: r.overdue_tasks(at, 10)) == (later, late)
        assert await store.read(lambda r: r.overdue_tasks(at, 1)) == (later,)
        assert await store.read(lambda r: r.overdue_tasks(NOW, 10)) == ()

    async def test_pages_hold_each_task_once_and_filters_narrow(self, store: Store) -> None:
        tasks = [task(f"tsk_{n}", user=f"usr_{n % 2}", created_at=NOW + (n // 3) * SECOND / 1000) for n in range(10)]
        await store.write(lambda w: [w.add_task(each) for each in tasks])
        await store.write(lambda w: w.replace_task(ended(tasks[0]), 1))

        listed: list[Task] = []
        after = None
        while True:
            page = await store.read(lambda r, after=after: r.list_tasks(TaskFilter(), after=after, limit=3))
            listed += page.tasks
            after = page.next
            if after is None:
                break
        assert listed == [ended(tasks[0]), *tasks[1:]]

        async def ids(**wanted: object) -> list[str]:
            page = await store.read(lambda r: r.list_tasks(TaskFilter(**wanted)))
            return [each.id for each in page.tasks]

        assert await ids(live=True, user="usr_0") == ["tsk_2", "tsk_4", "tsk_6", "tsk_8"]
        assert await ids(state=State.COMPLETED) == ["tsk_0"]
        assert await ids(agent=AGENT, user="usr_1", live=True) == ["tsk_1", "tsk_3", "tsk_5", "tsk_7", "tsk_9"]
        assert await ids(agent=SpiffeId("spiffe://example.org/x")) == []

    @pytest.mark.parametrize("after", ["", "x", "1", ".", "-1.x", "1e3.x", "9" * 30 + ".x"])
    async def test_a_page_token_of_somebody_else_is_refused(self, store: Store, after: str) -> None:
        with pytest.raises(Invalid) as invalid:
            await store.read(lambda r: r.list_tasks(TaskFilter(), after=after))
        assert invalid.value.reason == "invalid_page_token"

    async def test_the_epoch_of_a_tree_only_rises(self, store: Store) -> None:
        await store.write(lambda w: w.add_task(task()))
        assert await store.read(lambda r: r.root_epoch("tsk_1")) == 0
        assert await store.write(lambda w: (w.bump_epoch("tsk_1"), w.bump_epoch("tsk_1"))) == (1, 2)
        assert await store.read(lambda r: r.root_epoch("tsk_1")) == 2
        with pytest.raises(NotFound):
            await store.write(lambda w: w.bump_epoch("none"))


class TestTokens:
    async def test_they_are_added_counted_and_revoked_once(self, store: Store) -> None:
        bare = token("jti_2", session=None, x5t=None)
        await store.write(lambda w: (w.add_task(task()), w.add_token(token()), w.add_token(bare)))
        assert await store.read(lambda r: (r.token("jti_1"), r.token("jti_2"), r.token("no"))) == (token(), bare, None)
        assert await store.read(lambda r: (r.tokens_issued("tsk_1"), r.tokens_issued("no"))) == (2, 0)

        revoked = replace(token(), revoked_at=NOW + SECOND)
        assert await store.write(lambda w: w.revoke_token("jti_1", NOW + SECOND)) == revoked
        assert await store.write(lambda w: w.revoke_token("jti_1", NOW + HOUR)) is None
        assert await store.write(lambda w: w.revoke_token("no", NOW)) is None
        assert await store.read(lambda r: r.token("jti_1")) == revoked

    async def test_a_jti_is_taken_once_and_its_task_must_be_there(self, store: Store) -> None:
        with pytest.raises(NotFound):
            await store.write(lambda w: w.add_token(token()))
        await store.write(lambda w: (w.add_task(task()), w.add_token(token())))
        with pytest.raises(Conflict) as conflict:
            await store.write(lambda w: w.add_token(token(scope="more")))
        assert conflict.value.reason == "token_exists"


class TestFrames:
    async def test_a_frame_is_a_change_of_the_same_number(self, store: Store) -> None:
        told: list[Change] = []
        store.subscribe(told.extend)
        await store.write(lambda w: w.change("entry", "x", ""))
        seq = await store.write(lambda w: w.add_frame(frame()))

        assert (seq, told[-1].seq, told[-1].kind, told[-1].key) == (2, 2, "frame", "tsk_1")
        rows = await store.read(lambda r: r.frames_since(0))
        assert rows == (FrameRow.of(told[-1]),)
        assert replace(rows[0], seq=0) == FrameRow.of(replace(told[-1], seq=0))
        assert (rows[0].root, rows[0].committed_at, rows[0].epoch) == ("tsk_1", frame().committed_at, 1)

    async def test_the_snapshot_holds_what_a_living_token_may_meet(self, store: Store) -> None:
        over = frame(forget_at=int(NOW.timestamp()))
        numbers = await store.write(
            lambda w: [w.add_frame(each) for each in (over, frame(), frame(kind="token", jti="j"))]
        )
        assert [row.seq for row in await store.read(lambda r: r.live_frames(NOW))] == numbers[1:]
        assert [row.seq for row in await store.read(lambda r: r.frames_since(numbers[0]))] == numbers[1:]


class TestIdempotency:
    async def test_an_answer_is_given_again_to_the_same_question_only(self, store: Store) -> None:
        await store.write(lambda w: w.remember("me", "k1", "digest", "answer", NOW + HOUR))
        assert await store.write(lambda w: w.recall("me", "k1", "digest")) == "answer"
        assert await store.write(lambda w: w.recall("you", "k1", "digest")) is None
        assert await store.write(lambda w: w.recall("me", "k2", "digest")) is None
        for ask in (
            lambda w: w.recall("me", "k1", "other"),
            lambda w: w.remember("me", "k1", "other", "answer", NOW + HOUR),
        ):
            with pytest.raises(Conflict) as conflict:
                await store.write(ask)
            assert conflict.value.reason == "idempotency_mismatch"

    async def test_of_two_at_once_one_does_the_work(self, store: Store) -> None:
        done: list[int] = []

        def act(w: Writer) -> str:
            kept = w.recall("me", "k", "d")
            if kept is None:
                done.append(1)
                kept = "made once"
                w.remember("me", "k", "d", kept, NOW + HOUR)
            return kept

        assert await asyncio.gather(*(store.write(act) for _ in range(20))) == ["made once"] * 20
        assert len(done) == 1


class TestSweep:
    async def test_only_what_is_past_its_time_goes(self, store: Store) -> None:
        def fill(w: Writer) -> None:
            w.add_join_token("old", None, NOW)
            w.add_join_token("new", None, NOW + HOUR)
            w.remember("me", "old", "d", "r", NOW)
            w.remember("me", "new", "d", "r", NOW + HOUR)
            w.add_frame(frame(forget_at=int(NOW.timestamp())))
            w.add_frame(frame())
            w.put_session(session("ws_old", not_after=NOW - 25 * HOUR))
            w.put_session(session("ws_new"))
            w.record(record())

        await store.write(fill)
        assert await store.write(lambda w: w.sweep(NOW, 100)) == 4
        assert await store.write(lambda w: w.sweep(NOW, 100)) == 0
        assert await store.write(lambda w: w.recall("me", "old", "other")) is None
        assert await store.write(lambda w: w.recall("me", "new", "d")) == "r"
        assert (await store.write(lambda w: w.take_join_token("new", NOW))).token_hash == "new"
        assert len(await store.read(lambda r: r.frames_since(0))) == 1
        assert await store.read(lambda r: (r.session("ws_old"), r.session("ws_new"))) == (None, session("ws_new"))
        assert (await store.read(lambda r: r.chain_head())).seq == 1
        assert await store.read(lambda r: r.change_head()) == 2

    async def test_a_tree_stays_until_all_of_it_is_long_dead(self, store: Store) -> None:
        root = task()
        child = task("tsk_c", parent=root)
        await store.write(lambda w: (w.add_task(root), w.add_task(child), w.add_token(token(of="tsk_1"))))
        await store.write(lambda w: (w.replace_task(ended(root), 1), w.bump_epoch("tsk_1")))

        day_after = NOW + 25 * HOUR
        assert await store.write(lambda w: w.sweep(day_after, 100)) == 0
        await store.write(lambda w: w.cascade("tsk_1", Cause.PARENT_ENDED, NOW + SECOND))
        assert await store.write(lambda w: w.sweep(NOW + HOUR, 100)) == 0
        assert await store.write(lambda w: w.sweep(day_after, 100)) == 4
        assert await store.read(lambda r: r.subtree("tsk_1")) == ()
        assert await store.read(lambda r: r.token("jti_1")) is None

    async def test_it_takes_no_more_than_it_may(self, store: Store) -> None:
        await store.write(lambda w: [w.add_join_token(f"h{n}", None, NOW) for n in range(10)])
        assert [await store.write(lambda w: w.sweep(NOW, 4)) for _ in range(4)] == [4, 4, 2, 0]
