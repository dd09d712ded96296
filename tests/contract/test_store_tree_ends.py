"""A large tree that ends: by one row first, and nobody can tell, whatever is asked, when the rows of its tasks are written."""

from dataclasses import replace
from typing import Any

import pytest

from broker.errors import Conflict
from broker.server.store.ports import Reader, Store, Writer
from broker.server.store.rows import TaskFilter
from broker.server.store.tables import tree_ends
from broker.server.store.user_rows import LivingTasks
from broker.spiffe import SpiffeId
from broker.tasks.causes import Cause
from broker.tasks.task import State, Supervision
from tests.contract.acts import BoomError, Opener, failing
from tests.unit.server.store.samples import AGENT, HOUR, NOW, SECOND, ended, task, token

OTHER = SpiffeId("spiffe://example.org/agent/other")
AT = NOW + 2 * SECOND
LAPSED = {"state": State.SUSPENDED, "cause": Cause.LEASE_LAPSED}

ROOT = ended(task())
"""Ended by itself, as it is when what is below it follows."""
LEFT = task("tsk_l", parent=ROOT)
BELOW = [
    LEFT,
    task("tsk_o", parent=ROOT, expires_at=NOW + SECOND),
    task("tsk_n", parent=LEFT, created_at=NOW + 2 * HOUR, expires_at=NOW + 3 * HOUR),
    task("tsk_s", parent=LEFT, session=None, agent=OTHER, version=7, epoch=2, **LAPSED),
    task("tsk_b", parent=LEFT, session="ws_2", supervision=Supervision.LEASE, agent=OTHER),
]
DONE = ended(task("tsk_d", parent=ROOT), State.COMPLETED)
BESIDE = task("tsk_beside", expires_at=NOW + 2 * HOUR)
TASKS = [ROOT, *BELOW, DONE, BESIDE]


@pytest.fixture(autouse=True)
def every_tree_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree_ends, "WRITTEN_AT_ONCE", 0)


def plant(w: Writer) -> None:
    for each in TASKS:
        w.add_task(each)
    w.add_token(token(of="tsk_l", root="tsk_1"))


def end(w: Writer) -> int:
    return w.cascade("tsk_1", Cause.PARENT_ENDED, AT)


def answers(r: Reader) -> dict[str, Any]:
    """Everything that can be asked about tasks."""
    ids = [each.id for each in TASKS]
    filters = [
        TaskFilter(),
        TaskFilter(live=True),
        *(TaskFilter(state=state) for state in State),
        *(TaskFilter(live=live, root="tsk_1") for live in (True, False)),
        TaskFilter(parent="tsk_l", state=State.CASCADED),
        TaskFilter(agent=OTHER, live=True),
        TaskFilter(user="usr_1", state=State.EXPIRED),
    ]
    searches = [
        LivingTasks(user="usr_1"),
        LivingTasks(agent=OTHER),
        LivingTasks(location="https://tickets"),
        LivingTasks(user="usr_1", state=State.SUSPENDED, cause=Cause.LEASE_LAPSED),
    ]
    return {
        "one": [r.task(one) for one in ids],
        "up": [r.lineage(one) for one in ids],
        "down": [r.subtree(one) for one in ids],
        "lists": [r.list_tasks(wanted) for wanted in filters],
        "pages": [r.list_tasks(TaskFilter(live=live), limit=1) for live in (True, False)],
        "sessions": [r.tasks_of_session(one) for one in ("ws_1", "ws_2")],
        "overdue": [r.overdue_tasks(at, 2) for at in (NOW + SECOND, NOW + HOUR, NOW + 3 * HOUR)],
        "earliest": r.earliest_end(),
        "children": [(r.children_of(one), r.open_children(one, str(OTHER))) for one in ids],
        "leases": (r.leased_tasks(), r.lapsed_tasks()),
        "agents": (r.tasks_of_agent(OTHER), r.tasks_of_trust_domain(AGENT.trust_domain)),
        "living": [r.living_tasks(wanted, limit=10) for wanted in searches],
        "has": [r.has_tasks("usr_1", count) for count in range(1, 9)],
    }


async def written_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Give the answers as they would be if every row had been written with the end."""
    found: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(tree_ends, "WRITTEN_AT_ONCE", 100)
        with pytest.raises(BoomError):
            await store.write(failing(end, lambda w: found.append(answers(w))))
    return found[0]


@pytest.mark.bears("RV04", "V04")
async def test_no_answer_tells_when_the_rows_are_written(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    await store.write(plant)
    living = await store.read(answers)
    expected = await written_at_once(store, monkeypatch)
    assert await store.read(answers) == living, "that was undone"
    assert all(expected[asked] != living[asked] for asked in living), "each question can tell an ended tree"

    # Within the act that ends it, too, and for whoever remembers an answer from before.
    assert await store.write(lambda w: (answers(w), end(w), answers(w))) == (living, len(BELOW), expected)
    written = []
    for _ in range(4):
        assert await store.read(answers) == expected, written
        found, rows = await store.write(lambda w: (answers(w), w.write_tree_ends(2)))
        assert found == expected, written
        written.append(rows)
    assert written == [2, 2, 1, 0]
    assert await store.read(answers) == await store.write(answers) == expected


async def test_they_are_what_the_rules_say(store: Store) -> None:
    await store.write(plant)
    assert await store.write(end) == len(BELOW)
    left, overdue, late, lapsed, leased = BELOW
    cascaded = {"state": State.CASCADED, "cause": Cause.PARENT_ENDED, "ended_at": AT}
    told = {
        "tsk_l": replace(left, version=2, **cascaded),
        "tsk_o": replace(overdue, version=2, state=State.EXPIRED, cause=Cause.EXPIRED, ended_at=overdue.expires_at),
        "tsk_n": replace(late, version=2, **cascaded | {"ended_at": late.created_at}),
        "tsk_s": replace(lapsed, version=8, **cascaded),
        "tsk_b": replace(leased, version=2, **cascaded),
    }
    for limit in (0, 2, 2, 2):
        await store.write(lambda w, limit=limit: w.write_tree_ends(limit))
        assert {one: await store.read(lambda r, one=one: r.task(one)) for one in told} == told, limit
        others = await store.read(lambda r: (r.task("tsk_1"), r.task("tsk_d"), r.task("tsk_beside")))
        assert others == (ROOT, DONE, BESIDE)


async def test_it_survives_the_server(opener: Opener) -> None:
    async with opener() as store:
        await store.write(lambda w: (plant(w), end(w)))
        told = await store.read(answers)
        assert await store.write(lambda w: w.write_tree_ends(2)) == 2
    async with opener() as store:
        assert await store.read(answers) == told
        assert await store.write(lambda w: w.write_tree_ends(100)) == 3
        assert await store.read(answers) == told


@pytest.mark.bears("V01", "V04")
async def test_what_was_decided_before_the_end_is_not_written_after_it(store: Store) -> None:
    await store.write(lambda w: (plant(w), end(w)))
    with pytest.raises(Conflict) as stale:
        await store.write(lambda w: w.replace_task(replace(LEFT, epoch=1, version=2), 1))
    assert stale.value.reason == "stale_version"
    told = await store.read(answers)
    # A second end finds nothing to end: from the root, from the middle, or of the user.
    assert await store.write(lambda w: (end(w), w.cascade("tsk_l", Cause.PARENT_ENDED, AT + HOUR))) == (0, 0)
    assert await store.write(lambda w: w.cascade("tsk_beside", Cause.PARENT_ENDED, AT)) == 0
    assert await store.read(answers) == told
    assert await store.write(lambda w: w.end_tasks_of("usr_1", Cause.USER_DISABLED, AT, 10)) == 1
    assert (await store.read(lambda r: r.task("tsk_beside"))).state is State.REVOKED
    assert await store.read(lambda r: r.task("tsk_l")) == told["one"][1]


async def test_the_version_that_is_read_is_the_one_that_is_expected(store: Store) -> None:
    await store.write(lambda w: (plant(w), end(w)))
    read = await store.read(lambda r: r.task("tsk_l"))
    moved = replace(read, epoch=5, version=3)
    await store.write(lambda w: w.replace_task(moved, 2))
    for _ in range(2):
        assert await store.read(lambda r: r.task("tsk_l")) == moved
        await store.write(lambda w: w.write_tree_ends(100))


async def test_below_a_root_that_lives_another_may_begin(store: Store) -> None:
    root = task()
    await store.write(lambda w: (w.add_task(root), w.add_task(task("tsk_a", parent=root)), end(w)))
    later = task("tsk_later", parent=root)
    await store.write(lambda w: w.add_task(later))
    assert await store.read(lambda r: r.tasks_of_session("ws_1")) == (root, later)
    assert (await store.read(lambda r: r.task("tsk_a"))).state is State.CASCADED
    assert await store.write(lambda w: w.write_tree_ends(100)) == 0


async def test_of_several_trees_some_rows_at_a_time(store: Store) -> None:
    trees = [ended(task(f"tsk_{n}")) for n in range(3)]

    def grow(w: Writer) -> None:
        for root in trees:
            w.add_task(root)
            for name in "abc":
                w.add_task(task(f"{root.id}{name}", parent=root))
            assert w.cascade(root.id, Cause.PARENT_ENDED, AT) == 3

    await store.write(grow)
    told = await store.read(lambda r: r.list_tasks(TaskFilter(state=State.CASCADED)))
    assert len(told.tasks) == 9
    for rows in (4, 4, 1, 0):
        assert await store.write(lambda w: w.write_tree_ends(4)) == rows
        assert await store.read(lambda r: r.list_tasks(TaskFilter(state=State.CASCADED))) == told


async def test_a_tree_is_forgotten_when_all_of_it_is_written(store: Store) -> None:
    await store.write(lambda w: (plant(w), end(w)))
    long_after = NOW + 27 * HOUR
    assert await store.write(lambda w: w.sweep(long_after, 100)) == 0
    # As many as there are: whether these were all is not known yet.
    assert await store.write(lambda w: w.write_tree_ends(len(BELOW))) == len(BELOW)
    assert await store.write(lambda w: w.sweep(long_after, 100)) == 1 + len(TASKS) - 1 + 1, "with its token and its end"
    assert await store.read(lambda r: r.subtree("tsk_1")) == ()
    assert await store.write(lambda w: w.write_tree_ends(100)) == 0
    assert await store.read(lambda r: r.task("tsk_beside")) == BESIDE
