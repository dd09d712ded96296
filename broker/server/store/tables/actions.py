"""Actions that services do once for a task, and the tokens for one use that were used for them."""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from datetime import datetime
from typing import Final

from broker.errors import Conflict, NotFound, Refused
from broker.server.store.sql import (
    Dangling,
    Duplicate,
    Row,
    SqlTables,
    Value,
    micros,
    micros_or_none,
    moment,
    moment_or_none,
)
from broker.spiffe import SpiffeId
from broker.tasks import Resource
from broker.tasks.action import ActionRecord, ActionState, Intent

_COLUMNS: Final = (
    "id, task_id, root, audience, step, service, action, identifier, parameter_digest, jti, state, claimed_at, settle_by,"
    " settled_at, outcome"
)
_ONE: Final = f"SELECT {_COLUMNS} FROM actions WHERE id = ?"
_AT: Final = f"SELECT {_COLUMNS} FROM actions WHERE task_id = ? AND audience = ? AND step = ?"
_COUNT: Final = "SELECT count(*) FROM actions WHERE task_id = ?"
_ADD: Final = f"INSERT INTO actions ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_REPLACE: Final = (
    "UPDATE actions SET id = ?, service = ?, jti = ?, state = ?, claimed_at = ?, settle_by = ?, settled_at = ?, outcome = ?"
    " WHERE id = ? AND state = ?"
)
_USE: Final = "INSERT INTO used_tokens (jti, task_id, used_at) VALUES (?, ?, ?) ON CONFLICT (jti) DO NOTHING"


class ActionReading(SqlTables):
    """Reads actions."""

    def action(self, action_id: str) -> ActionRecord | None:
        """Give one action by the id of its claim, or None."""
        return self._action(_ONE, action_id)

    def action_at(self, task_id: str, audience: Resource, step: str) -> ActionRecord | None:
        """Give what is known of a step of a task at an audience, or None."""
        return self._action(_AT, task_id, audience.text, step)

    def actions_of(self, task_id: str) -> int:
        """Count the steps of a task that were claimed at all."""
        row = self._sql.row(_COUNT, (task_id,))
        return 0 if row is None else int(row[0])

    def _action(self, text: str, *values: str) -> ActionRecord | None:
        row = self._sql.row(text, values)
        return None if row is None else _read(row)


class ActionWriting(ActionReading):
    """Writes actions."""

    def add_action(self, record: ActionRecord) -> None:
        """Add; Conflict(code="action_exists"), NotFound when its task is unknown."""
        try:
            self._sql.attempt(_ADD, _values(record))
        except Duplicate:
            raise Conflict("this step was claimed already", code="action_exists") from None
        except Dangling:
            raise NotFound("there is no such task") from None

    def replace_action(self, record: ActionRecord, before: ActionRecord) -> None:
        """Write what became of it, or who claims its step anew; Conflict(code="stale_action") when it is not as before."""
        if (record.task, record.intent) != (before.task, before.intent):
            raise ValueError("a step never stands for something else")
        values: tuple[Value, ...] = (
            record.id,
            str(record.service),
            record.jti,
            record.state,
            micros(record.claimed_at),
            micros(record.settle_by),
            micros_or_none(record.settled_at),
            record.outcome,
        )
        if not self._sql.run(_REPLACE, (*values, before.id, before.state)):
            raise Conflict("the action has changed since it was read", code="stale_action", hint="ask again")

    def use_token(self, jti: str, task_id: str, at: datetime) -> None:
        """Use a token up that serves once; Refused(code="token_used"), NotFound when its task is unknown."""
        try:
            is_first = self._sql.attempt(_USE, (jti, task_id, micros(at)))
        except Dangling:
            raise NotFound("there is no such task") from None
        if not is_first:
            raise Refused(
                "this token serves one action, and was used",
                code="token_used",
                hint="ask for another one for each action",
            )


def _values(record: ActionRecord) -> tuple[Value, ...]:
    intent = record.intent
    return (
        record.id,
        record.task,
        record.root,
        intent.audience.text,
        intent.step,
        str(record.service),
        intent.action,
        intent.identifier,
        intent.parameter_digest,
        record.jti,
        record.state,
        micros(record.claimed_at),
        micros(record.settle_by),
        micros_or_none(record.settled_at),
        record.outcome,
    )


def _read(row: Row) -> ActionRecord:
    return ActionRecord(
        id=row[0],
        task=row[1],
        root=row[2],
        service=SpiffeId(row[5]),
        intent=Intent(
            audience=Resource(row[3]), action=row[6], step=row[4], identifier=row[7], parameter_digest=row[8]
        ),
        jti=row[9],
        state=ActionState(row[10]),
        claimed_at=moment(row[11]),
        settle_by=moment(row[12]),
        settled_at=moment_or_none(row[13]),
        outcome=row[14],
    )
