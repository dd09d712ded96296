"""What waits for a person's yes, and what became of it. Each row is written once and then only moves on."""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from typing import Final

from broker.errors import Conflict
from broker.server.store.approval_ports import ApprovalFilter, ApprovalPage
from broker.server.store.sql import (
    Duplicate,
    Row,
    SqlTables,
    Value,
    micros,
    micros_or_none,
    moment,
    moment_or_none,
    read_list,
    text_list,
)
from broker.server.store.tables.places import place_after, place_of
from broker.spiffe import strictjson
from broker.tasks.approval import Approval, ApprovalState, Wanted
from broker.tasks.delegation import Delegation

MAX_PAGE: Final = 100
"""Most approvals of one page: each may hold an authority of some KiB."""

_WANTED: Final = "id, wanted, purpose, rules, policy, created_at, expires_at"
_MOVING: Final = "asked_at, state, decided_at, decided_by, approver, reason, approved_until, used_at, jti"
_COLUMNS: Final = f"{_WANTED}, {_MOVING}"
_ONE: Final = f"SELECT {_COLUMNS} FROM approvals WHERE id = ?"
_OF_TASK: Final = (
    f"SELECT {_COLUMNS} FROM approvals WHERE task_id = ? AND digest = ? ORDER BY created_at DESC, id DESC LIMIT 1"
)
_OF_TOKEN: Final = f"SELECT {_COLUMNS} FROM approvals WHERE jti = ?"
_COUNT: Final = "SELECT count(*) FROM approvals WHERE task_id = ?"
_LIST: Final = f"SELECT {_COLUMNS} FROM approvals WHERE (created_at, id) > (?, ?)"
_IN_ORDER: Final = " ORDER BY created_at, id LIMIT ?"
_ADD: Final = (
    f"INSERT INTO approvals (task_id, user_id, digest, {_COLUMNS})"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_MOVE: Final = (
    "UPDATE approvals SET asked_at = ?, state = ?, decided_at = ?, decided_by = ?, approver = ?, reason = ?,"
    " approved_until = ?, used_at = ?, jti = ? WHERE id = ? AND state = ?"
)


class ApprovalReading(SqlTables):
    """Reads approvals."""

    def approval(self, approval_id: str) -> Approval | None:
        """Give one, or None."""
        return _first(self._sql.row(_ONE, (approval_id,)))

    def latest_approval(self, task: str, digest: str) -> Approval | None:
        """Give the one that a task asked for last of just this, or None."""
        return _first(self._sql.row(_OF_TASK, (task, digest)))

    def approval_of_token(self, jti: str) -> Approval | None:
        """Give the one that a token was issued on, or None."""
        return _first(self._sql.row(_OF_TOKEN, (jti,)))

    def count_approvals(self, task: str) -> int:
        """Tell how many a task ever asked for."""
        row = self._sql.row(_COUNT, (task,))
        return 0 if row is None else int(row[0])

    def list_approvals(self, wanted: ApprovalFilter, *, after: str | None = None, limit: int = 100) -> ApprovalPage:
        """Give a page, oldest first; Invalid(code="invalid_page_token") for a token not ours."""
        size = max(1, min(limit, MAX_PAGE))
        text, values = _narrowed(wanted)
        rows = self._sql.rows(_LIST + text + _IN_ORDER, (*place_after(after), *values, size + 1))
        page = tuple(map(_read, rows[:size]))
        return ApprovalPage(page, place_of(page[-1].created_at, page[-1].id) if len(rows) > size else None)


class ApprovalWriting(ApprovalReading):
    """Writes approvals."""

    def add_approval(self, approval: Approval) -> None:
        """Add; Conflict(code="approval_exists") where one of its id, or an open one for the same, is there."""
        wanted = approval.wanted
        values = (
            wanted.task,
            wanted.user,
            wanted.digest,
            approval.id,
            strictjson.canonical(wanted.to_json()).decode(),
            approval.purpose,
            text_list(approval.rules),
            approval.policy,
            micros(approval.created_at),
            micros(approval.expires_at),
            *_moving(approval),
        )
        try:
            self._sql.attempt(_ADD, values)
        except Duplicate:
            raise Conflict("this waits for an approval already", code="approval_exists") from None

    def replace_approval(self, approval: Approval, *, was: ApprovalState) -> None:
        """Write what became of one; Conflict(code="conflict") where it does not stand as it ``was``."""
        try:
            moved = self._sql.attempt(_MOVE, (*_moving(approval), approval.id, was))
        except Duplicate:
            # A token that another one stands on already.
            moved = 0
        if not moved:
            raise Conflict("the approval has moved on", code="conflict", hint="read it again and decide anew")


def _moving(approval: Approval) -> tuple[Value, ...]:
    return (
        micros(approval.asked_at),
        approval.state,
        micros_or_none(approval.decided_at),
        approval.decided_by,
        None if approval.approver is None else strictjson.canonical(approval.approver.to_json()).decode(),
        approval.reason,
        micros_or_none(approval.approved_until),
        micros_or_none(approval.used_at),
        approval.jti,
    )


def _narrowed(wanted: ApprovalFilter) -> tuple[str, list[Value]]:
    text, values = "", list[Value]()
    for column, value in (("user_id", wanted.user), ("task_id", wanted.task)):
        if value:
            text += f" AND {column} = ?"
            values.append(value)
    now = micros(wanted.now)
    match wanted.state:
        case None:
            pass
        case ApprovalState.PENDING:
            text += " AND state = 'pending' AND expires_at > ?"
            values.append(now)
        case ApprovalState.APPROVED:
            text += " AND state = 'approved' AND approved_until > ?"
            values.append(now)
        case ApprovalState.EXPIRED:
            text += (
                " AND (state = 'expired' OR (state = 'pending' AND expires_at <= ?)"
                " OR (state = 'approved' AND approved_until <= ?))"
            )
            values += [now, now]
        case state:
            text += " AND state = ?"
            values.append(state)
    return text, values


def _first(row: Row | None) -> Approval | None:
    return None if row is None else _read(row)


def _read(row: Row) -> Approval:
    return Approval(
        id=row[0],
        wanted=Wanted.parse(strictjson.loads(row[1].encode())),
        purpose=row[2],
        rules=read_list(row[3], str),
        policy=row[4],
        created_at=moment(row[5]),
        expires_at=moment(row[6]),
        asked_at=moment(row[7]),
        state=ApprovalState(row[8]),
        decided_at=moment_or_none(row[9]),
        decided_by=row[10],
        approver=None if row[11] is None else Delegation.parse(strictjson.loads(row[11].encode())),
        reason=row[12],
        approved_until=moment_or_none(row[13]),
        used_at=moment_or_none(row[14]),
        jti=row[15],
    )
