"""Two servers over one store: what one hears, the other does not miss; who sees a lease lapse first acts, once."""

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest

from broker.audit.events import Event
from broker.audit.records import Record
from broker.server.store.ports import Store, Writer
from broker.server.tasks.requests import Actor, Door
from broker.server.tasks.supervisor import TELL_EVERY, SupervisionRules, Supervisor, begin_lease
from broker.tasks.task import State, Supervision
from tests.fakes.running_agent import until
from tests.unit.server.store.samples import AGENT, HOUR, NOW, X5T, task

RULES = SupervisionRules()


class Clock:
    def __init__(self) -> None:
        self.passed = 0.0

    def now(self) -> datetime:
        return NOW + timedelta(seconds=self.passed)

    def monotonic(self) -> float:
        return self.passed


async def look(clock: Clock, seconds: float, *supervisors: Supervisor) -> None:
    for _ in range(round(seconds)):
        clock.passed += 1.0
        for one in supervisors:
            await one.check()


def start(writer: Writer) -> None:
    made = task(session=None, supervision=Supervision.LEASE)
    writer.add_task(made)
    begin_lease(writer, made)


async def heard(store: Store, is_so: Callable[[], bool]) -> None:
    """Changes of a shared store are told a moment after their commit."""
    await store.read(lambda reader: reader.change_head())
    await until(is_so)


async def test_a_heartbeat_at_one_server_is_heard_by_the_other(store: Store) -> None:
    if not store.is_shared:
        pytest.skip("one server has this store to itself")
    clock = Clock()
    here, there = Supervisor(store, clock, RULES), Supervisor(store, clock, RULES)
    await here.start()
    await there.start()
    await store.write(start)
    await heard(store, lambda: "tsk_1" in there._tasks and "tsk_1" in here._tasks)
    actor = Actor(AGENT, X5T, NOW + HOUR, Door.HTTPS)
    for _ in range(4):
        await look(clock, 20, here, there)
        before = there._tasks.left("tsk_1", there._now())
        await here.renew(actor, "tsk_1")
        await look(clock, TELL_EVERY, here)
        await heard(store, lambda before=before: there._tasks.left("tsk_1", there._now()) > before)
    found = await store.read(lambda reader: reader.task("tsk_1"))
    assert found is not None
    assert found.state is State.ACTIVE
    # Silent at both: each sees it, one record is written.
    await look(clock, 40, here, there)
    found = await store.read(lambda reader: reader.task("tsk_1"))
    assert found is not None
    assert found.state is State.SUSPENDED
    rows = await store.read(lambda reader: reader.records(0, 100))
    records = [Record.from_body(row.body) for row in rows]
    assert [record.event for record in records] == [Event.TASK_SUSPENDED]
