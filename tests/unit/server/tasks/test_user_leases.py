"""Sessions that lapse and come back, case by case: many tasks, crashes, a policy that says no, a lease that is newer than its tasks."""

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from broker.server.store.ports import Writer
from broker.server.store.rows import TaskFilter
from broker.server.store.user_rows import UserLease, UserSession
from broker.server.tasks.requests import Operation
from broker.server.tasks.standing import Standing
from broker.server.tasks.user_leases import TASKS_AT_ONCE, Looked, UserLeases
from broker.tasks import Cause, State
from tests.attacks.tasks.userends_rig import Scene, playing
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.life import change

LEASE = 200
MANY = 2 * TASKS_AT_ONCE + 10


@pytest.fixture(scope="module")
def oidc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path_factory.mktemp("oidc")) as issuer:
        yield issuer


@pytest.fixture
async def scene(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Scene]:
    async with playing(tmp_path, oidc, leases={oidc.issuer: timedelta(seconds=LEASE)}) as open_scene:
        yield open_scene


async def look(scene: Scene, seconds: float = 0) -> Looked:
    scene.estate.clock.advance(seconds)
    return await scene.estate.ends.leases.look()


async def states(scene: Scene) -> dict[State, int]:
    def count(reader: Any) -> dict[State, int]:
        found: dict[State, int] = {}
        after = None
        while True:
            page = reader.list_tasks(TaskFilter(), after=after, limit=500)
            for task in page.tasks:
                found[task.state] = found.get(task.state, 0) + 1
            after = page.next
            if after is None:
                return found

    return await scene.estate.store.read(count)


async def session(scene: Scene, sid: str = "s-1") -> UserSession:
    found = await scene.estate.store.read(lambda reader: reader.user_session(scene.oidc.issuer, sid, "alice"))
    assert found is not None
    return found


async def filled(scene: Scene, count: int, **claims: Any) -> None:
    work = await scene.work(lifetime=3600, **claims)

    def fill(writer: Writer) -> None:
        for number in range(count - 1):
            name = f"tsk_{number:05}"
            writer.add_task(replace(work.task, id=name, root=name))

    await scene.estate.store.write(fill)


async def test_many_tasks_of_one_session_stop_and_go_on_in_steps(scene: Scene) -> None:
    await filled(scene, MANY)
    assert await look(scene, LEASE) == Looked(MANY, 0)
    assert (await states(scene), (await session(scene)).lease) == ({State.SUSPENDED: MANY}, UserLease.LAPSED)
    assert await look(scene) == Looked(0, 0)
    assert await scene.estate.start(user_token=scene.user_token())
    assert (await session(scene)).lease is UserLease.RETURNING
    assert await look(scene) == Looked(0, MANY)
    assert (await states(scene), (await session(scene)).lease) == ({State.ACTIVE: MANY + 1}, UserLease.HELD)


async def test_a_step_that_a_crash_left_is_gone_on_with(scene: Scene) -> None:
    await filled(scene, MANY)
    scene.estate.clock.advance(LEASE)
    leases, silent = scene.estate.ends.leases, await session(scene)
    await scene.estate.store.write(lambda writer: leases._suspend(writer, silent, None))
    assert await states(scene) == {State.SUSPENDED: TASKS_AT_ONCE, State.ACTIVE: MANY - TASKS_AT_ONCE}
    assert await look(scene) == Looked(MANY - TASKS_AT_ONCE, 0)
    await scene.estate.start(user_token=scene.user_token())
    again = await session(scene)
    await scene.estate.store.write(lambda writer: leases._resume(writer, again, None))
    # Silent again before all of them went on: those that did are suspended again.
    assert await look(scene, LEASE) == Looked(TASKS_AT_ONCE + 1, 0)


async def test_a_policy_that_says_no_keeps_it_suspended(scene: Scene) -> None:
    work = await scene.work(lifetime=3600)
    await look(scene, LEASE)
    scene.estate.exchange._policy.rules.deny_all("another", "it is newer")
    await scene.estate.store.write(
        lambda writer: scene.estate.exchange._standing.hear(writer, _subject(work.task), scene.estate.clock.now())
    )
    assert await look(scene) == Looked(0, 0)
    assert ((await work.state()).state, (await session(scene)).lease) == (State.SUSPENDED, UserLease.HELD)


def _subject(task: Any) -> Any:
    """A newer word of the same session, as the issuer's token would be read."""

    class Word:
        issuer, user, session = task.delegation.issuer, task.user, task.delegation.session
        issued_at = task.delegation.issued_at + timedelta(seconds=LEASE)

        def delegation(self) -> Any:
            return replace(task.delegation, issued_at=self.issued_at)

    return Word()


async def test_a_lease_that_is_newer_than_its_tasks_counts_for_them(tmp_path: Path, oidc: OidcIssuer) -> None:
    async with playing(tmp_path, oidc) as scene:
        work = await scene.work(sid=None, lifetime=3600)
        estate = scene.estate
        standing = Standing({oidc.issuer: timedelta(seconds=LEASE)})
        leases = UserLeases(estate.store, estate.clock, standing, estate.exchange._policy.rules)
        estate.clock.advance(LEASE)
        assert await leases.look() == Looked(0, 0)
        await leases.settle()
        assert await leases.look() == Looked(1, 0)
        assert (await work.state()).cause is Cause.USER_UNCONFIRMED


async def test_a_task_that_stands_still_for_another_reason_stays_as_it_is(scene: Scene) -> None:
    work = await scene.work(lifetime=3600)
    await change(scene.estate, scene.estate.actor(), work.task, Operation.SUSPEND)
    assert await look(scene, LEASE) == Looked(0, 0)
    await scene.estate.start(user_token=scene.user_token())
    assert await look(scene) == Looked(0, 0)
    assert ((await work.state()).state, (await work.state()).cause) == (State.SUSPENDED, Cause.PAUSED)


async def test_nothing_runs_where_no_issuer_has_a_lease(tmp_path: Path, oidc: OidcIssuer) -> None:
    async with playing(tmp_path, oidc) as scene:
        assert list(scene.estate.ends.leases.loops()) == []
