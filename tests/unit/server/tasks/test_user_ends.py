"""What ends by its user, case by case: fetched events, leases, stops that a crash leaves unfinished, kill switches, many tasks."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from broker.audit.events import Event
from broker.errors import Invalid, Misconfigured, Unavailable
from broker.server.tasks.config import SubjectIssuer, Transmitter, check_transmitters
from broker.server.tasks.signal_poll import Poller
from broker.server.tasks.stops import ENDED_AT_ONCE
from broker.spiffe import SpiffeId
from broker.tasks import Cause, Resource, State
from broker.tasks.stop import Stop, StopKind
from tests.attacks.tasks.userends_rig import CAEP, RISC, Scene, outcome, playing
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import AGENT, NEIGHBOUR, TICKETS, WIKI, X5T_2, authority, detail

TOKEN = "Bearer of-this-stream"


@pytest.fixture(scope="module")
def oidc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path_factory.mktemp("oidc")) as issuer:
        yield issuer


@pytest.fixture
async def scene(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Scene]:
    async with playing(tmp_path, oidc) as open_scene:
        yield open_scene


def polled(oidc: OidcIssuer, **fields: Any) -> Transmitter:
    return Transmitter(
        **{
            "issuer": oidc.issuer,
            "audiences": frozenset({"broker"}),
            "subject_issuer": oidc.issuer,
            "ca_path": oidc.ca_path,
            "jwks_url": f"{oidc.issuer}/jwks",
            "poll_url": f"{oidc.issuer}/poll",
            "token": TOKEN.removeprefix("Bearer "),
        }
        | fields
    )


class TestFetchedEvents:
    @pytest.fixture
    async def scene(self, tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Scene]:
        oidc.events, oidc.polled, oidc.poll_token, oidc.fault = {}, [], TOKEN, ""
        async with playing(tmp_path, oidc, transmitters=(polled(oidc),)) as open_scene:
            yield open_scene
        oidc.fault = ""

    async def fetch(self, scene: Scene) -> None:
        (poller,) = scene.estate.ends.pollers
        while await poller.fetch():
            pass

    async def test_they_do_what_pushed_ones_do_and_are_acknowledged_after_it(self, scene: Scene) -> None:
        work = await scene.work()
        scene.oidc.events = {
            "one": scene.event(CAEP + "session-revoked", jti="one", subject=scene.subject(session="s-1")),
            "two": scene.event(RISC + "account-disabled", jti="two", subject=scene.subject("bob")),
        }
        await self.fetch(scene)
        assert await work.is_dead()
        assert await outcome(scene.estate.start(user_token=scene.user_token("bob"))) == "user_disabled"
        assert scene.oidc.events == {}
        assert [sorted(asked["ack"]) for asked in scene.oidc.polled] == [[], ["one", "two"]]
        assert all("setErrs" not in asked for asked in scene.oidc.polled)

    @pytest.mark.bears("RV19")
    async def test_refused_ones_are_reported_and_others_go_on(self, scene: Scene) -> None:
        work = await scene.work()
        scene.oidc.events = {
            "sub": scene.event(CAEP + "session-revoked", jti="sub", sub="alice"),
            "iss": scene.event(CAEP + "session-revoked", jti="iss", iss="https://evil.example"),
            "aud": scene.event(CAEP + "session-revoked", jti="aud", aud="another"),
            "other": scene.event(CAEP + "session-revoked", jti="not-that"),
            "good": scene.event("https://schemas.openid.net/secevent/ssf/event-type/verification", jti="good"),
        }
        await self.fetch(scene)
        told = scene.oidc.polled[-1]
        assert told["ack"] == ["good"]
        assert {jti: error["err"] for jti, error in told["setErrs"].items()} == {
            "sub": "invalid_request", "iss": "invalid_issuer", "aud": "invalid_audience", "other": "invalid_request",
        }  # fmt: skip
        assert await work.renewal() == "done"
        assert len(await scene.records(Event.SIGNAL_REFUSED)) == 4

    async def test_one_that_comes_again_is_acknowledged_again(self, scene: Scene) -> None:
        told = scene.event(RISC + "account-disabled", jti="one")
        for _ in range(2):
            scene.oidc.events = {"one": told}
            await self.fetch(scene)
            assert scene.oidc.events == {}
        assert len(await scene.records(Event.SIGNAL_RECEIVED)) == 1

    async def test_more_than_one_answer_holds_is_fetched_at_once(self, scene: Scene) -> None:
        kind = "https://schemas.openid.net/secevent/ssf/event-type/verification"
        scene.oidc.events = {f"e{n}": scene.event(kind, jti=f"e{n}") for n in range(130)}
        await self.fetch(scene)
        assert scene.oidc.events == {}
        assert len(await scene.records(Event.SIGNAL_RECEIVED)) == 130

    @pytest.mark.parametrize("fault", ["status", "token"])
    async def test_a_transmitter_that_refuses_is_asked_again_later(self, scene: Scene, fault: str) -> None:
        if fault == "token":
            scene.oidc.poll_token = "another"
        else:
            scene.oidc.fault = fault
        (poller,) = scene.estate.ends.pollers
        with pytest.raises(Unavailable):
            await poller.fetch()
        pauses: list[float] = []

        async def sleep(seconds: float) -> None:
            pauses.append(seconds)
            if len(pauses) == 6:
                raise asyncio.CancelledError

        events, signals = scene.estate.ends.events, scene.estate.ends.signals
        again = Poller(polled(scene.oidc), events, signals, sleep=sleep)
        with pytest.raises(asyncio.CancelledError):
            await again.run()
        await again.aclose()
        assert pauses == [10, 20, 40, 60, 60, 60]

    async def test_its_events_are_not_taken_when_they_are_pushed(self, scene: Scene) -> None:
        answer = await scene.push(scene.event(CAEP + "session-revoked"))
        assert (answer.status_code, answer.json()["err"]) == (403, "access_denied")


class TestTransmitters:
    async def test_a_pusher_shows_its_token_where_one_is_set(self, tmp_path: Path, oidc: OidcIssuer) -> None:
        async with playing(tmp_path, oidc, transmitters=(polled(oidc, poll_url=""),)) as scene:
            told = scene.event(CAEP + "session-revoked")
            for headers in ({}, {"authorization": "Bearer another"}, {"authorization": TOKEN.removeprefix("Bearer ")}):
                answer = await scene.push(told, **headers)
                assert (answer.status_code, answer.json()["err"]) == (401, "authentication_failed")
            assert (await scene.push(told, authorization=TOKEN)).status_code == 202

    def test_one_speaks_of_the_users_of_a_known_issuer(self, oidc: OidcIssuer) -> None:
        subject = SubjectIssuer(oidc.issuer, frozenset({"broker"}))
        assert check_transmitters([polled(oidc)], [subject])
        for wrong in ([polled(oidc)] * 2, [polled(oidc, subject_issuer="https://other.example")]):
            with pytest.raises(Misconfigured):
                check_transmitters(wrong, [subject])

    @pytest.mark.parametrize("wrong", [{"issuer": "http://a"}, {"poll_url": "http://a"}, {"audiences": frozenset()}, {"poll_every": 0}])  # fmt: skip
    def test_what_cannot_be_is_refused(self, oidc: OidcIssuer, wrong: dict[str, Any]) -> None:
        with pytest.raises(Misconfigured):
            polled(oidc, **wrong)

    def test_its_configuration_lies_before_its_path(self, oidc: OidcIssuer) -> None:
        found = polled(oidc, issuer="https://idp.example:8443/tenant/a").discovery
        assert found == "https://idp.example:8443/.well-known/ssf-configuration/tenant/a"


class TestLeases:
    @pytest.fixture
    async def scene(self, tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Scene]:
        leases = {oidc.issuer: timedelta(seconds=200)}
        async with playing(tmp_path, oidc, leases=leases) as open_scene:
            yield open_scene

    async def test_a_session_of_which_nothing_is_heard_gives_nothing_more(self, scene: Scene) -> None:
        work = await scene.work(lifetime=3600)
        old = scene.user_token(lifetime=3600)
        scene.estate.clock.advance(199)
        assert await work.renewal() == "done"
        work.token = await scene.estate.issue(work.task)
        scene.estate.clock.advance(1)
        assert (await work.renewal(), await work.introspected()) == ("user_session_unconfirmed", False)
        # The token of before proves nothing of now.
        assert await outcome(scene.estate.issue(work.task, user_token=old)) == "user_session_unconfirmed"
        assert await outcome(scene.estate.start(user_token=old)) == "user_session_unconfirmed"

    async def test_a_fresh_token_of_the_same_session_confirms_it(self, scene: Scene) -> None:
        work = await scene.work(lifetime=3600)
        scene.estate.clock.advance(300)
        other = scene.user_token(sid="s-2", auth_time=scene.now() - 300)
        assert await outcome(scene.estate.issue(work.task, user_token=other)) == "user_session_unconfirmed"
        fresh = scene.user_token(auth_time=scene.now() - 300)
        assert await outcome(scene.estate.issue(work.task, user_token=fresh)) == "done"
        scene.estate.clock.advance(199)
        assert await work.renewal() == "done"

    async def test_an_issuer_that_tells_no_session_is_heard_by_its_user(self, scene: Scene) -> None:
        work = await scene.work(sid=None, lifetime=3600)
        scene.estate.clock.advance(201)
        assert await work.renewal() == "user_session_unconfirmed"
        assert await outcome(scene.estate.issue(work.task, user_token=scene.user_token(sid=None))) == "done"

    async def test_a_standing_delegation_needs_no_session(self, scene: Scene) -> None:
        made = (await scene.delegate()).json()
        scene.estate.clock.advance(400)
        read = authority(detail(actions=["ticket.read"]))
        task = await scene.estate.start(user_token="", delegation_id=made["id"], authority=read)
        assert await outcome(scene.estate.issue(task)) == "done"


class TestUnfinished:
    async def many(self, scene: Scene, count: int) -> list[str]:
        """Give many tasks of one session, as rows."""
        work = await scene.work()

        def fill(writer: Any) -> list[str]:
            names = [f"tsk_{number:05}" for number in range(count)]
            for name in names:
                writer.add_task(replace(work.task, id=name, root=name))
            return names

        return [work.task.id, *(await scene.estate.store.write(fill))]

    async def living(self, scene: Scene) -> int:
        def count(reader: Any) -> int:
            return len(reader.list_tasks(_live(), limit=1000).tasks)

        return await scene.estate.store.read(count)

    async def test_the_sweep_goes_on_where_a_crash_stopped(self, scene: Scene) -> None:
        await self.many(scene, 600)
        stop = Stop(
            kind=StopKind.SESSION,
            name=f"{scene.oidc.issuer} s-1",
            source=scene.oidc.issuer,
            not_before=scene.estate.clock.now(),
            cause=Cause.USER_LOGOUT,
            changed_at=scene.estate.clock.now(),
            unfinished=True,
        )
        # As it is when a server dies between the stop and its tasks.
        await scene.estate.store.write(lambda writer: writer.put_stop(stop))
        assert await self.living(scene) == 601
        assert await scene.estate.ends.stops.sweep() == 601
        assert await self.living(scene) == 0
        assert await scene.estate.ends.stops.sweep() == 0

    async def test_a_session_of_many_tasks_ends_in_steps_each_with_its_frame(self, scene: Scene) -> None:
        names = await self.many(scene, 2 * ENDED_AT_ONCE)
        answer = await scene.logout(scene.logout_token(sid="s-1"))
        assert answer.status_code == 200
        assert await self.living(scene) == 0
        trees = {frame.root for frame in await scene.frames() if frame.kind == "subtree"}
        assert trees == set(names)
        assert len(await scene.records(Event.TASK_ENDED)) == len(names)
        told = [record.fields["tasks_ended"] for record in await scene.records(Event.TASKS_STOPPED)]
        assert sum(int(str(one)) for one in told) == len(names)

    async def test_a_session_of_two_users_ends_for_both_where_the_first_one_fills_a_step(self, scene: Scene) -> None:
        other = await scene.work("bob")
        await self.many(scene, ENDED_AT_ONCE - 1)
        await scene.logout(scene.logout_token(sid="s-1"))
        assert await self.living(scene) == 0
        assert await other.is_dead()

    async def test_new_sessions_of_the_user_are_passed_over(self, scene: Scene) -> None:
        await self.many(scene, 300)
        scene.estate.clock.advance(10)
        told = scene.logout_token(sub="alice")
        scene.estate.clock.advance(10)
        newer = await scene.work(sid="s-2")
        await scene.logout(told)
        assert await self.living(scene) == 1
        assert await newer.renewal() == "done"


def _live() -> Any:
    from broker.server.store.rows import TaskFilter  # noqa: PLC0415 - for this one line

    return TaskFilter(live=True)


class TestKillSwitches:
    async def test_an_agent_ends_and_its_neighbour_goes_on(self, scene: Scene) -> None:
        mine = await scene.work()
        node = SpiffeId("spiffe://example.org/spire/agent/join_token/two")
        neighbour = scene.estate.actor(spiffe_id=NEIGHBOUR, entry_id="entry-2", session="ws_2", x5t=X5T_2, agent=node)
        other = await scene.estate.start(neighbour, user_token=scene.user_token())
        stopped = await scene.estate.ends.users.stop_agent(AGENT, by="operator:uid:0", reason="runs away")
        assert stopped.tasks_ended == 1
        assert await mine.is_dead()
        assert await mine.verifier() in ("task_ended", "agent_stopped")
        assert await outcome(scene.estate.issue(other, neighbour)) == "done"

    async def test_an_audience_ends_and_others_go_on(self, scene: Scene) -> None:
        tickets = await scene.work()
        wiki = await scene.estate.start(authority=authority(detail(locations=[WIKI.text])))
        stopped = await scene.estate.ends.users.stop_audience(TICKETS, by="operator:uid:0")
        assert stopped.tasks_ended == 1
        assert await tickets.is_dead()
        assert await outcome(scene.estate.issue(wiki, resource=WIKI)) == "done"

    async def test_only_at_a_segment(self, scene: Scene) -> None:
        await scene.work()
        longer = Resource("https://tickets.example.org.evil.example")
        assert (await scene.estate.ends.users.stop_audience(longer, by="operator:uid:0")).tasks_ended == 0
        part = Resource("https://tickets.example.or")
        assert (await scene.estate.ends.users.stop_audience(part, by="operator:uid:0")).tasks_ended == 0

    async def test_what_is_not_a_name_or_a_sentence_reaches_no_record(self, scene: Scene) -> None:
        users = scene.estate.ends.users
        for act, named in ((users.disable, "alice"), (users.enable, "alice"), (users.stop_user, "alice"), (users.stop_agent, AGENT), (users.stop_audience, TICKETS)):  # fmt: skip
            with pytest.raises(Invalid):
                await act(named, by="operator:uid:0", reason="left\nthe company")  # type: ignore[operator]
        for act in (users.disable, users.enable, users.stop_user):
            for named in ("", "alice\n"):
                with pytest.raises(Invalid) as refused:
                    await act(named, by="operator:uid:0")
                assert named or refused.value.reason == "user_missing"
        assert await scene.records(Event.TASKS_STOPPED, Event.USER_ENABLED) == []

    async def test_a_user_signs_in_anew(self, scene: Scene) -> None:
        work = await scene.work()
        made = (await scene.delegate()).json()
        await scene.estate.ends.users.stop_user("alice", by="operator:uid:0")
        assert await work.is_dead()
        assert await work.exchange() == "user_ended"
        assert await outcome(scene.estate.start(user_token="", delegation_id=made["id"])) == "delegation_withdrawn"
        scene.estate.clock.advance(31)
        assert await work.exchange() == "done"

    async def test_a_child_ends_without_its_parent(self, scene: Scene) -> None:
        """The agent's part of a tree ends, with what hangs below it, and its relatives live."""
        parent = await scene.work()
        child = replace(
            parent.task,
            id="tsk_child",
            parent=parent.task.id,
            depth=1,
            agent=NEIGHBOUR,
            expires_at=parent.task.expires_at,
        )
        below = replace(child, id="tsk_below", parent=child.id, depth=2, agent=SpiffeId("spiffe://example.org/third"))
        await scene.estate.store.write(lambda writer: (writer.add_task(child), writer.add_task(below)))
        stopped = await scene.estate.ends.users.stop_agent(NEIGHBOUR, by="operator:uid:0")
        assert stopped.tasks_ended == 1
        states = [await scene.estate.store.read(lambda r, n=n: r.task(n)) for n in (parent.task.id, child.id, below.id)]
        assert [one.state for one in states if one] == [State.ACTIVE, State.REVOKED, State.CASCADED]
        assert await parent.renewal() == "done"
