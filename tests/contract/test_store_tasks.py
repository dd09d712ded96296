"""Tasks and their trees."""

import asyncio
from dataclasses import replace

import pytest

from broker.errors import Conflict, Invalid, NotFound
from broker.server.store.ports import Store, Writer, making_nothing_due
from broker.server.store.rows import TaskFilter
from broker.spiffe import SpiffeId
from broker.tasks.causes import Cause
from broker.tasks.task import State, Task
from tests.contract.acts import failing
from tests.unit.server.store.samples import (
    AGENT,
    HOUR,
    NOW,
    SECOND,
    ended,
    task,
)


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
        # The first may run again, where only the whole group could be undone.
        assert (set(seen[:-2]), seen[-2:]) == ({lost}, [task(), ended(task())])

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

    @pytest.mark.bears("RV04")
    async def test_a_cascade_walks_through_what_has_ended(self, store: Store) -> None:
        """The one between is over and the one below it is not, as no use case leaves it: the end from above finds it still."""
        top = task()
        root, between = task("tsk_r", parent=top), task("tsk_b", parent=task("tsk_r", parent=top))
        leaf = task("tsk_x", parent=between)
        await store.write(lambda w: [w.add_task(each) for each in (top, root, between, leaf)])
        await store.write(lambda w: w.replace_task(ended(between), 1))
        for start, expected in (("tsk_r", 1), ("tsk_1", 1)):
            count = await store.write(lambda w, start=start: w.cascade(start, Cause.PARENT_ENDED, NOW + SECOND))
            assert count == expected, start
            assert (await store.read(lambda r: r.task("tsk_x"))).state is State.CASCADED
        assert await store.read(lambda r: r.task("tsk_b")) == ended(between), "and what had ended stays as it was"

    async def test_the_tasks_of_a_session_are_its_living_ones(self, store: Store) -> None:
        mine, over, other = task(), task("tsk_2"), task("tsk_3", session="ws_2")
        await store.write(lambda w: [w.add_task(each) for each in (mine, over, other)])
        await store.write(lambda w: w.replace_task(ended(over), 1))
        assert await store.read(lambda r: r.tasks_of_session("ws_1")) == (mine,)

    async def test_the_next_end_is_that_of_a_living_task(self, store: Store) -> None:
        assert await store.read(lambda r: r.earliest_end()) is None
        first, second = task("tsk_1", expires_at=NOW + SECOND), task("tsk_2", expires_at=NOW + 2 * SECOND)
        await store.write(lambda w: [w.add_task(each) for each in (second, first)])
        assert await store.read(lambda r: r.earliest_end()) == first.expires_at
        before = store.written
        await store.write(lambda w: w.replace_task(ended(first), 1))
        assert await store.read(lambda r: r.earliest_end()) == second.expires_at
        await store.write(making_nothing_due(lambda w: w.sweep(NOW, 10)))
        assert store.written == before + 1

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
