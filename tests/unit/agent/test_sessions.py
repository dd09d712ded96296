"""Sessions: one for each attested process instance, and none for what it was before or became."""

import os
import subprocess
from datetime import datetime, timedelta

import pytest

from broker.agent.cache import EstateCache
from broker.agent.sessions import MAX_JWTS, Sessions
from broker.agent.wire import bundle, entry
from broker.attestation.process import Process
from broker.clock import SystemClock
from broker.errors import NotAttested
from broker.spiffe import Selector
from broker.tasks.causes import SessionEnd
from tests.fakes.fake_server import TD, FakeCa, entry_message

SELECTORS = frozenset({Selector("unix:uid:1")})


class Clock(SystemClock):
    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead

    def now(self) -> datetime:
        return super().now() + timedelta(seconds=self.ahead)


class Estate:
    def __init__(self) -> None:
        self.cache = EstateCache(TD)
        self.cache.replace([entry(entry_message("e1", "/a", ["unix:uid:1"]), TD)], [bundle(FakeCa().message())])
        self.clock = Clock()
        self.ended = []
        self.causes = []
        self.sessions = Sessions(self.cache, self.clock, on_identities_ended=self.took)

    def took(self, identities, cause) -> None:
        self.ended.extend(identities)
        self.causes.append(cause)


def opened(pid: int) -> Process:
    pidfd = os.pidfd_open(pid)
    try:
        return Process.open(pid=pid, uid=os.geteuid(), gid=os.getegid(), pidfd=pidfd)
    finally:
        os.close(pidfd)


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["/bin/sleep", "60"])
    yield process
    process.kill()
    process.wait()


class Leaf:
    shared = False


async def test_the_same_process_finds_its_session(sleeper) -> None:
    estate = Estate()
    session = estate.sessions.start(opened(sleeper.pid), SELECTORS)
    again, other = opened(sleeper.pid), opened(os.getpid())
    assert estate.sessions.of(again) is session
    assert estate.sessions.of(other) is None
    again.close()
    other.close()
    estate.sessions.end_all()
    assert len(estate.sessions) == 0


@pytest.mark.bears("V07")
async def test_the_end_of_the_process_is_the_end_of_the_session(sleeper) -> None:
    estate = Estate()
    session = estate.sessions.start(opened(sleeper.pid), SELECTORS)
    identity = session.identity(estate.sessions.entries(session)[0])
    identity.x509 = Leaf()
    with session.listening(estate.cache) as bell:
        await bell.wait(0)
        sleeper.kill()
        assert await bell.wait(5)
    assert session.is_ended
    assert not session.bells
    assert estate.ended == [identity]
    with pytest.raises(NotAttested):
        estate.sessions.check(session)
    estate.sessions.end(session, SessionEnd.OTHER)
    assert estate.ended == [identity]


async def test_facts_that_differ_end_the_older_session(sleeper) -> None:
    estate = Estate()
    session = estate.sessions.start(opened(sleeper.pid), SELECTORS)
    object.__setattr__(session.process, "facts", opened_and_closed(os.getpid()))
    now = opened(sleeper.pid)
    assert estate.sessions.of(now) is None
    assert session.is_ended
    now.close()


def opened_and_closed(pid: int):
    process = opened(pid)
    process.close()
    return process.facts


async def test_a_process_that_is_described_otherwise_by_now_finds_no_session(sleeper, monkeypatch) -> None:
    estate = Estate()
    session, again = estate.sessions.start(opened(sleeper.pid), SELECTORS), opened(sleeper.pid)
    monkeypatch.setattr(Process, "still_same", changed)
    assert estate.sessions.of(again) is None
    assert session.is_ended
    again.close()


def changed(process: Process) -> None:
    raise NotAttested("changed", code="process_changed")


async def test_of_two_attestations_of_one_process_the_later_one_holds(sleeper) -> None:
    """Its rights changed between two connections: each was asked about by itself, and only one can be looked after."""
    estate = Estate()
    first, second = (estate.sessions.start(opened(sleeper.pid), SELECTORS) for _ in range(2))
    assert (first.is_ended, second.is_ended, list(estate.sessions)) == (True, False, [second])
    estate.sessions.end_all()


async def test_an_ended_session_is_never_looked_at_again(sleeper, monkeypatch) -> None:
    """The numbers of its descriptors may be another process's by now."""
    estate = Estate()
    session = estate.sessions.start(opened(sleeper.pid), SELECTORS)
    estate.sessions.end(session, SessionEnd.SELECTORS_CHANGED)
    monkeypatch.setattr(Process, "still_same", lambda self: None)
    monkeypatch.setattr(Process, "still_there", lambda self: None)
    for fully in (None, True, False):
        with pytest.raises(NotAttested) as refused:
            estate.sessions.check(session, fully=fully)
        assert refused.value.reason == "session_ended"


async def test_the_full_check_comes_once_a_second(sleeper, monkeypatch) -> None:
    estate = Estate()
    session = estate.sessions.start(opened(sleeper.pid), SELECTORS)
    done = []
    monkeypatch.setattr(Process, "still_same", lambda self: done.append("full"))
    monkeypatch.setattr(Process, "still_there", lambda self: done.append("cheap"))
    estate.sessions.check(session)
    estate.clock.ahead = 1.5
    estate.sessions.check(session)
    estate.sessions.check(session)
    estate.sessions.check(session, fully=True)
    estate.clock.ahead = 10
    estate.sessions.check(session, fully=False)  # a round over thousands: cheap, however long ago
    assert done == ["cheap", "full", "cheap", "full", "cheap"]
    estate.sessions.end_all()


async def test_an_identity_that_is_withdrawn_ends_under_its_id(sleeper) -> None:
    estate = Estate()
    session = estate.sessions.start(opened(sleeper.pid), SELECTORS)
    identity = session.identity(estate.sessions.entries(session)[0])
    identity.x509 = Leaf()
    session.remember(("e1", ("a",)), object())
    estate.cache.apply(deleted=["e1"])
    assert estate.sessions.entries(session) == ()
    assert (estate.ended, session.identities, dict(session.jwts)) == ([identity], {}, {})
    # The same entry anew is another session.
    estate.cache.apply(upserted=[entry(entry_message("e1", "/a", ["unix:uid:1"]), TD)])
    assert session.identity(estate.sessions.entries(session)[0]).id != identity.id
    estate.sessions.end_all()


async def test_an_entry_ends_by_its_own_time(sleeper) -> None:
    estate = Estate()
    message = entry_message("e1", "/a", ["unix:uid:1"])
    message.entry.expires_at = int(estate.clock.now().timestamp()) + 60
    estate.cache.apply(upserted=[entry(message, TD)])
    session = estate.sessions.start(opened(sleeper.pid), SELECTORS)
    assert estate.sessions.entries(session)
    estate.clock.ahead = 61
    assert not estate.sessions.entries(session)
    estate.sessions.end_all()


async def test_tokens_are_bounded_and_the_least_used_goes_first(sleeper) -> None:
    estate = Estate()
    session = estate.sessions.start(opened(sleeper.pid), SELECTORS)
    for n in range(MAX_JWTS + 1):
        session.remember(("e1", (str(n),)), object())
    assert len(session.jwts) == MAX_JWTS
    assert ("e1", ("0",)) not in session.jwts
    estate.sessions.end_all()


async def test_ids_are_unguessable_and_one_per_identity(sleeper) -> None:
    estate = Estate()
    estate.cache.apply(upserted=[entry(entry_message("e2", "/b", ["unix:uid:1"]), TD)])
    session = estate.sessions.start(opened(sleeper.pid), SELECTORS)
    one, two = (session.identity(each) for each in estate.sessions.entries(session))
    assert one.id != two.id
    assert one.id.startswith("ws_")
    assert len(one.id) >= len("ws_") + 22
    assert session.identity(one.entry) is one
    estate.sessions.end_all()
