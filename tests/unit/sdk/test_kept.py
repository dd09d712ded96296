"""What a process keeps of its tokens: dropped by whatever ends them, asked for anew where nothing was heard, and only so many."""

from dataclasses import dataclass, field, replace
from datetime import timedelta
from math import inf
from typing import Any

import pytest

from broker._proto.broker.server.v1 import tasks_pb2
from broker.sdk.feed import FeedState
from broker.sdk.kept import HEARD_WITHIN, MOST_KEPT, RENEW_BEFORE, TRUSTED_FOR, KeptToken, KeptTokens, Name
from broker.tasks import Confirmation
from tests.unit.sdk.world import SteppedClock, frame, snapshot
from tests.unit.tasks.world import AGENT, TICKETS, X5T, TokenKey, claims, delegation, task

NAME: Name = (TICKETS.text, "", "", "")
OTHER: Name = (TICKETS.text, "ticket.read", "", "")


@dataclass
class Holding:
    """Kept tokens, the feed that they are judged by, and a clock that is stepped."""

    clock: SteppedClock = field(default_factory=SteppedClock)
    key: TokenKey = field(default_factory=TokenKey)
    feed: FeedState = field(default_factory=FeedState)
    kids: frozenset[str] = frozenset()
    leaf: str | None = X5T
    heard: float | None = None

    def __post_init__(self) -> None:
        self.kept = KeptTokens(self, self.clock, about={"tsk_1"}, leaf=lambda: self.leaf)
        self.hear(snapshot(self.key))

    def silence(self, token: KeptToken) -> float:
        return inf if self.heard is None else self.clock.monotonic() - self.heard

    def is_dead(self, token: KeptToken) -> bool:
        return token.is_dead(self.feed, self.kids)

    def hear(self, message: Any) -> None:
        self.feed.apply(message, monotonic=self.clock.monotonic(), now=int(self.clock.now().timestamp()))

    def made(self, **members: Any) -> KeptToken:
        now = self.clock.now()
        word = delegation(expires_at=now + timedelta(hours=1), session="s-1")
        started = replace(task(now=now, delegation=word), epoch=3)
        text = self.key.token(claims(started, now=now, **members).to_payload())
        token = KeptToken.of(
            tasks_pb2.IssuedToken(access_token=text, expires_at=int(now.timestamp()) + 180), self.clock.monotonic()
        )
        assert token is not None
        return token

    def one(self, **members: Any) -> str:
        token = self.made(**members)
        assert self.kept.keep(NAME, token)
        assert self.kept.current(NAME) == token.text
        return token.text


ENDS = [
    {"kind": "subtree", "root": "tsk_1", "epoch": 4},
    {"kind": "task", "task": "tsk_1", "state": "revoked"},
    {"kind": "task", "task": "tsk_1", "state": "suspended", "epoch": 4},
    {"kind": "session", "session": "ws_1"},
    {"kind": "token", "task": "tsk_1", "jti": "jti_1"},
    {"kind": "user", "name": "usr_1", "not_before": 2**40},
    {"kind": "user", "name": "usr_1", "sid": "s-1", "not_before": 2**40},
    {"kind": "agent", "name": str(AGENT), "not_before": 2**40},
    {"kind": "audience", "name": TICKETS.text, "not_before": 2**40},
]
OTHERS = [
    {"kind": "subtree", "root": "tsk_1", "epoch": 3},
    {"kind": "task", "task": "tsk_2", "state": "revoked"},
    {"kind": "session", "session": "ws_2"},
    {"kind": "token", "task": "tsk_1", "jti": "jti_2"},
    {"kind": "user", "name": "usr_1", "sid": "s-2", "not_before": 2**40},
    {"kind": "user", "name": "usr_1", "not_before": 1},
]


@pytest.mark.parametrize("members", ENDS, ids=lambda members: "-".join(map(str, members.values())))
def test_what_ends_it_drops_it_and_keeps_it_out(members: dict[str, Any]) -> None:
    here = Holding()
    here.one()
    here.hear(frame(2, **members))
    here.kept.drop_ended()
    assert (len(here.kept), here.kept.current(NAME), here.kept.working(NAME)) == (0, None, None)
    # One that was on its way meanwhile.
    assert not here.kept.keep(NAME, here.made())
    assert len(here.kept) == 0


@pytest.mark.parametrize("members", OTHERS, ids=lambda members: "-".join(map(str, members.values())))
def test_what_ends_others_leaves_it(members: dict[str, Any]) -> None:
    here = Holding()
    text = here.one()
    here.hear(frame(2, **members))
    here.kept.drop_ended()
    assert here.kept.current(NAME) == text


def test_a_key_that_counts_no_longer_leaves_nothing_that_it_signed() -> None:
    here = Holding()
    here.one()
    here.kids = frozenset({here.key.kid, "k2"})
    here.kept.drop_ended()
    assert len(here.kept) == 1
    here.kids = frozenset({"k2"})
    here.kept.drop_ended()
    assert len(here.kept) == 0


def test_all_by_whose_end_it_ends_is_named() -> None:
    here = Holding()
    here.one()
    assert here.kept.names == {"tsk_1", "usr_1", str(AGENT), TICKETS.text, "ws_1"}
    here.kept.clear()
    assert here.kept.names == {"tsk_1"}


def test_without_a_word_it_is_asked_about_and_then_good_for_nothing() -> None:
    here = Holding()
    text = here.one()
    here.clock.step(HEARD_WITHIN)
    assert (here.kept.current(NAME), here.kept.is_current(text)) == (text, True)
    here.clock.step(0.1)
    assert (here.kept.current(NAME), here.kept.is_current(text), here.kept.working(NAME)) == (None, False, text)
    here.clock.step(TRUSTED_FOR - HEARD_WITHIN)
    assert here.kept.working(NAME) is None
    here.heard = here.clock.monotonic()
    assert here.kept.current(NAME) == text


def test_its_last_seconds_are_for_what_cannot_be_renewed() -> None:
    here = Holding()
    text = here.one()
    here.clock.step(181 - RENEW_BEFORE)
    here.heard = here.clock.monotonic()
    assert (here.kept.current(NAME), here.kept.working(NAME)) == (None, text)
    here.clock.step(RENEW_BEFORE)
    here.heard = here.clock.monotonic()
    assert here.kept.working(NAME) is None


def test_under_the_next_certificate_it_works_by_its_session_alone() -> None:
    here = Holding()
    text = here.one()
    here.leaf = "another"
    assert (here.kept.current(NAME), here.kept.working(NAME)) == (None, text)
    here.kept.keep(NAME, here.made(cnf=Confirmation(X5T)))
    assert here.kept.working(NAME) is None


def test_what_the_broker_denied_is_kept_no_longer() -> None:
    here = Holding()
    here.one()
    here.kept.keep(OTHER, here.made())
    here.kept.refused(NAME, is_all=False)
    assert (here.kept.working(NAME), len(here.kept)) == (None, 1)
    here.kept.refused(NAME, is_all=True)
    assert len(here.kept) == 0


def test_one_that_a_service_refused_is_forgotten_alone() -> None:
    here = Holding()
    text = here.one()
    here.kept.keep(OTHER, here.made())
    here.kept.forget(text)
    assert (here.kept.current(NAME), len(here.kept)) == (None, 1)


def test_there_are_only_so_many() -> None:
    here = Holding()
    names = [(TICKETS.text, str(number), "", "") for number in range(MOST_KEPT + 1)]
    for name in names:
        here.kept.keep(name, here.made())
    assert len(here.kept) == MOST_KEPT
    assert here.kept.current(names[0]) is None
    assert here.kept.current(names[-1]) is not None


def test_what_cannot_be_read_is_not_kept_and_nothing_shows_it() -> None:
    here = Holding()
    token = here.made()
    assert token.text not in repr(token)
    for text in ("opaque", here.key.token({"sub": "usr_1"})):
        assert KeptToken.of(tasks_pb2.IssuedToken(access_token=text), 0) is None


def test_what_serves_once_is_not_kept() -> None:
    here = Holding()
    said = here.made().claims
    once = replace(said, task=replace(said.task, use="once"))
    text = here.key.token(once.to_payload())
    assert KeptToken.of(tasks_pb2.IssuedToken(access_token=text), 0) is None
