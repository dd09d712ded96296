"""The life of tasks: children, resumes, and whom a task took over from."""

from dataclasses import replace
from datetime import timedelta

from broker.server.store.ports import Store
from broker.server.store.rows import ResumeRow, TaskFilter
from broker.server.store.tables.housekeeping import KEPT_AFTER_END
from broker.spiffe import SpiffeId
from tests.unit.server.store.samples import AGENT, HOUR, NOW, SECOND, ended, task

OTHER = SpiffeId("spiffe://example.org/other")


async def test_children_are_counted_and_found(store: Store) -> None:
    root, left, right = task(), task("tsk_l", parent=task()), task("tsk_r", parent=task(), agent=OTHER)
    below = task("tsk_x", parent=left)
    await store.write(lambda w: [w.add_task(each) for each in (root, left, right, below)])
    assert await store.read(lambda r: [r.children_of(one) for one in ("tsk_1", "tsk_l", "tsk_x", "none")]) == [
        2,
        1,
        0,
        0,
    ]
    await store.write(lambda w: w.replace_task(ended(right), 1))
    assert await store.read(lambda r: r.children_of("tsk_1")) == 2, "over its life"
    assert await store.read(lambda r: r.open_children("tsk_1", str(AGENT))) == ("tsk_l",)
    assert await store.read(lambda r: r.open_children("tsk_1", str(OTHER))) == ()
    listed = await store.read(
        lambda r: [r.list_tasks(TaskFilter(**f)).tasks for f in ({"parent": "tsk_1"}, {"root": "tsk_1"})]
    )
    assert [[each.id for each in tasks] for tasks in listed] == [
        ["tsk_l", "tsk_r"],
        ["tsk_1", "tsk_l", "tsk_r", "tsk_x"],
    ]


async def test_what_it_superseded_comes_back_and_stays(store: Store) -> None:
    heir = task(supersedes="tsk_0", history=(OTHER, SpiffeId("spiffe://example.org/first")))
    await store.write(lambda w: w.add_task(heir))
    assert await store.read(lambda r: r.task("tsk_1")) == heir
    assert await store.read(lambda r: r.lineage("tsk_1")) == (heir,)
    forged = replace(ended(heir), supersedes="tsk_x", history=(OTHER,))
    await store.write(lambda w: w.replace_task(forged, 1))
    assert await store.read(lambda r: r.task("tsk_1")) == ended(heir)


async def test_resumes_are_counted_and_forgotten_with_their_tree(store: Store) -> None:
    await store.write(lambda w: w.add_task(task()))
    for minutes, before in ((0, None), (1, "ws_1"), (2, "ws_2")):
        row = ResumeRow("tsk_1", NOW + timedelta(minutes=minutes), f"ws_{minutes + 1}", before)
        await store.write(lambda w, row=row: w.add_resume(row))
    since = NOW + timedelta(minutes=1)
    counted = await store.read(lambda r: (r.resumes_of("tsk_1"), r.resumes_of("tsk_1", since), r.resumes_of("none")))
    assert counted == (3, 1, 0)
    await store.write(lambda w: w.replace_task(ended(task()), 1))
    await store.write(lambda w: w.sweep(NOW + KEPT_AFTER_END + 48 * HOUR + SECOND, 100))
    assert await store.read(lambda r: (r.task("tsk_1"), r.resumes_of("tsk_1"))) == (None, 0)
