"""Stops and the sessions that users came from, and the tasks that hang on them.

What a task's delegation says lies in one canonical JSON text: a member of it is looked for as text, among the tasks of one
user, and judged again by whoever asked.
"""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

from broker.errors import Invalid
from broker.server.store.sql import Row, Value, micros, moment
from broker.server.store.tables.places import place_after, place_of
from broker.server.store.tables.tasks import SELECT_LIVING, TaskReading
from broker.server.store.tables.tree_ends import LIVING
from broker.server.store.user_rows import LivingPage, LivingTasks, UserLease, UserSession
from broker.spiffe import strictjson
from broker.tasks.causes import Cause
from broker.tasks.stop import Stop, StopKind
from broker.tasks.task import State

_STOP: Final = "kind, name, source, not_before, tokens_from, disabled, cause, unfinished, changed_at"
_STOPS: Final = f"SELECT {_STOP} FROM stops WHERE "
_NAMED: Final = "(kind = ? AND name = ?)"
_UNFINISHED: Final = f"SELECT {_STOP} FROM stops WHERE unfinished = 1 ORDER BY changed_at, kind, name LIMIT ?"
_ONE_STOP: Final = f"SELECT {_STOP} FROM stops WHERE kind = ? AND name = ? AND source = ?"
_PUT_STOP: Final = (
    f"INSERT INTO stops ({_STOP}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (kind, name, source) DO UPDATE SET"
    " not_before = excluded.not_before, tokens_from = excluded.tokens_from, disabled = excluded.disabled,"
    " cause = excluded.cause, unfinished = excluded.unfinished, changed_at = excluded.changed_at"
)
_LIFT: Final = (
    "UPDATE stops SET disabled = 0, not_before = CASE WHEN not_before > ? THEN not_before ELSE ? END"
    " WHERE kind = ? AND name = ? AND source = ?"
)
_FINISH: Final = "UPDATE stops SET unfinished = 0 WHERE kind = ? AND name = ? AND source = ?"
_SESSION: Final = "issuer, sid, user_id, confirmed_at, seen_at"
_READ_SESSIONS: Final = f"SELECT {_SESSION}, lease FROM user_sessions WHERE issuer = ?"
_SESSIONS: Final = f"{_READ_SESSIONS} AND sid = ? ORDER BY user_id"
_ONE_SESSION: Final = f"{_READ_SESSIONS} AND sid = ? AND user_id = ?"
_SILENT: Final = f"{_READ_SESSIONS} AND lease <> 'lapsed' AND confirmed_at <= ? ORDER BY confirmed_at LIMIT ?"
_RETURNING: Final = f"{_READ_SESSIONS} AND lease = 'returning' AND confirmed_at > ? ORDER BY confirmed_at LIMIT ?"
_PUT_LEASE: Final = "UPDATE user_sessions SET lease = ? WHERE issuer = ? AND sid = ? AND user_id = ?"
_SEE: Final = (
    f"INSERT INTO user_sessions ({_SESSION}) VALUES (?, ?, ?, ?, ?) ON CONFLICT (issuer, sid, user_id) DO UPDATE SET"
    " confirmed_at = CASE WHEN user_sessions.confirmed_at > excluded.confirmed_at THEN user_sessions.confirmed_at"
    " ELSE excluded.confirmed_at END,"
    " seen_at = CASE WHEN user_sessions.seen_at > excluded.seen_at THEN user_sessions.seen_at ELSE excluded.seen_at END"
)
# The end of a task's time leads over the index of those that live.
_LIVING: Final = f"{SELECT_LIVING} AND expires_at > 0 AND (created_at, id) > (?, ?)"
# Text of a member is there if the whole is another without it: both stores look at case, and at nothing else.
_HOLDS: Final = " AND replace({column}, ?, '') <> {column}"
_END_OF_USER: Final = (
    "UPDATE tasks SET version = version + 1,"
    " state = CASE WHEN expires_at <= ? THEN ? WHEN depth = 0 THEN ? ELSE ? END,"
    " cause = CASE WHEN expires_at <= ? THEN ? WHEN depth = 0 THEN ? ELSE ? END,"
    " ended_at = CASE WHEN expires_at <= ? THEN expires_at WHEN created_at > ? THEN created_at ELSE ? END"
    f" WHERE id IN (SELECT id FROM tasks WHERE user_id = ? AND {LIVING} LIMIT ?)"
)
_HAS: Final = f"SELECT 1 FROM tasks WHERE user_id = ? AND {LIVING} LIMIT 1 OFFSET ?"
SEEN_AGAIN: Final = timedelta(minutes=1)
"""How long a session counts as just seen: sessions are kept for weeks, and every exchange with a user's token sees one."""


class UserReading(TaskReading):
    """Reads stops, sessions, and the tasks that hang on them."""

    def stops(self, names: Sequence[tuple[StopKind, str]]) -> tuple[Stop, ...]:
        """Give the stops of these names, of every source."""
        if not names:
            return ()
        values = [value for name in names for value in name]
        return tuple(map(_read_stop, self._sql.ask(_STOPS + " OR ".join([_NAMED] * len(names)), values)))

    def unfinished_stops(self, limit: int) -> tuple[Stop, ...]:
        """Give stops whose tasks may not all be written down as ended, the longest waiting first."""
        return tuple(map(_read_stop, self._sql.rows(_UNFINISHED, (limit,))))

    def user_sessions(self, issuer: str, sid: str) -> tuple[UserSession, ...]:
        """Give the sessions of this id."""
        return tuple(map(_read_session, self._sql.rows(_SESSIONS, (issuer, sid))))

    def user_session(self, issuer: str, sid: str, user: str) -> UserSession | None:
        """Give one session, or None."""
        rows = self._sql.ask(_ONE_SESSION, (issuer, sid, user))
        return _read_session(rows[0]) if rows else None

    def silent_user_sessions(self, issuer: str, until: datetime, limit: int) -> tuple[UserSession, ...]:
        """Give sessions that were last confirmed at ``until`` or before and are not written as lapsed, the longest silent first."""
        return tuple(map(_read_session, self._sql.rows(_SILENT, (issuer, micros(until), limit))))

    def returning_user_sessions(self, issuer: str, since: datetime, limit: int) -> tuple[UserSession, ...]:
        """Give sessions that are written as returning and were confirmed after ``since``."""
        return tuple(map(_read_session, self._sql.rows(_RETURNING, (issuer, micros(since), limit))))

    def has_tasks(self, user: str, count: int) -> bool:
        """Tell whether at least so many tasks of a user live."""
        return self._sql.row(_HAS, (user, count - 1)) is not None

    def living_tasks(self, wanted: LivingTasks, *, after: str | None = None, limit: int) -> LivingPage:
        """Give a page of tasks that have not ended, oldest first; Invalid for a search without a limit."""
        text, values = _LIVING, list[Value](place_after(after))
        for condition, value in _conditions(wanted):
            text += condition
            values.append(value)
        if wanted.roots:
            text += " AND depth = 0"
        rows = self._sql.rows(f"{text} ORDER BY created_at, id LIMIT ?", (*values, limit + 1))
        tasks = tuple(self._read(row) for row in rows[:limit])
        return LivingPage(tasks, place_of(tasks[-1].created_at, tasks[-1].id) if len(rows) > limit else None)


class UserWriting(UserReading):
    """Writes stops and sessions, and ends a user's tasks."""

    def put_stop(self, stop: Stop) -> Stop:
        """Add, or add up with the one of the same kind, name and source; give what stands then."""
        row = self._sql.row(_ONE_STOP, (stop.kind, stop.name, stop.source))
        summed = stop.after(None if row is None else _read_stop(row))
        times = (micros(summed.not_before), summed.tokens_from)
        rest = (int(summed.disabled), summed.cause, int(summed.unfinished), micros(summed.changed_at))
        self._sql.run(_PUT_STOP, (summed.kind, summed.name, summed.source, *times, *rest))
        return summed

    def lift_stop(self, stop: Stop, at: datetime) -> Stop:
        """Take back that a stop disables; give what stands then."""
        self._sql.run(_LIFT, (micros(at), micros(at), stop.kind, stop.name, stop.source))
        row = self._sql.row(_ONE_STOP, (stop.kind, stop.name, stop.source))
        return stop if row is None else _read_stop(row)

    def finish_stop(self, stop: Stop) -> None:
        """Note that every task that the stop ends is written down."""
        self._sql.run(_FINISH, (stop.kind, stop.name, stop.source))

    def see_user_session(self, session: UserSession) -> None:
        """Note a session; its times only grow, that it was seen again counts from minute to minute, and what is written of its lease stays."""
        known = self.user_session(session.issuer, session.sid, session.user)
        if (
            known is not None
            and known.confirmed_at >= session.confirmed_at
            and known.seen_at + SEEN_AGAIN > session.seen_at
        ):
            return
        times = (micros(session.confirmed_at), micros(session.seen_at))
        self._sql.run(_SEE, (session.issuer, session.sid, session.user, *times))

    def put_user_lease(self, session: UserSession, lease: UserLease) -> None:
        """Write what became of a session's tasks."""
        self._sql.run(_PUT_LEASE, (lease, session.issuer, session.sid, session.user))

    def end_tasks_of(self, user: str, cause: Cause, at: datetime, limit: int) -> int:
        """End up to ``limit`` living tasks of a user in one statement; give their number."""
        now = micros(at)
        state = (now, State.EXPIRED, State.REVOKED, State.CASCADED)
        why = (now, Cause.EXPIRED, cause, Cause.PARENT_ENDED)
        return self._sql.run(_END_OF_USER, (*state, *why, now, now, now, user, limit))


def _conditions(wanted: LivingTasks) -> list[tuple[str, Value]]:
    conditions: list[tuple[str, Value]] = []
    if wanted.user:
        conditions.append((" AND user_id = ?", wanted.user))
    if wanted.agent is not None:
        conditions.append((" AND agent = ?", str(wanted.agent)))
    for name, text in wanted.given:
        member = strictjson.canonical({name: text}).decode()
        conditions.append((_HOLDS.format(column="delegation"), member[1:-1]))
    if wanted.location:
        # Without the closing quote: what lies below it, too.
        begun = strictjson.canonical(wanted.location).decode().removesuffix('"')
        conditions.append((_HOLDS.format(column="authority"), begun))
    if wanted.state is not None:
        conditions.append((" AND state = ?", wanted.state))
    if wanted.cause is not None:
        conditions.append((" AND cause = ?", wanted.cause))
    if not conditions:
        raise Invalid("a search for tasks names nothing", code="invalid_search")
    return conditions


def _read_stop(row: Row) -> Stop:
    return Stop(
        kind=StopKind(row[0]),
        name=row[1],
        source=row[2],
        not_before=moment(row[3]),
        tokens_from=row[4],
        disabled=bool(row[5]),
        cause=Cause(row[6]),
        unfinished=bool(row[7]),
        changed_at=moment(row[8]),
    )


def _read_session(row: Row) -> UserSession:
    return UserSession(row[0], row[1], row[2], moment(row[3]), moment(row[4]), UserLease(row[5]))
