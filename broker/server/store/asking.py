"""What the writer was told before: a question whose rows cannot have changed since is not put to the database again.

Every exchange asks for the same few rows: the session, the node, the entry and the task behind it, and that nothing of them was
stopped or revoked. What holds it together is one rule, not a list of tables: whatever is written forgets every answer, and so
does whatever is undone and whatever somebody else wrote. Only ``append`` forgets nothing: it adds a row to a table that no
remembered question reads (a test watches that). So an answer is always what the database would say now.
"""

from collections.abc import Sequence
from typing import Final

from typing_extensions import override

from broker.server.store.sql import Row, Sql, Value

ANSWERS_KEPT: Final = 4_096
"""Answers remembered at a time, some hundred bytes each: those of a thousand busy workloads; then it starts anew."""


class RememberingSql(Sql):
    """The connection of the one who writes, with a memory. It must be the only one that writes, or be told of others' writes."""

    def __init__(self, sql: Sql) -> None:
        """Speak through this connection."""
        self._sql = sql
        self._answers: dict[tuple[str, tuple[Value, ...]], Sequence[Row]] = {}
        self.writes = 0
        """How many statements were run that may have written something, whatever became of them."""

    @override
    def run(self, text: str, values: Sequence[Value] = ()) -> int:
        self._answers.clear()
        self.writes += 1
        return self._sql.run(text, values)

    @override
    def attempt(self, text: str, values: Sequence[Value] = ()) -> int:
        self._answers.clear()
        self.writes += 1
        return self._sql.attempt(text, values)

    @override
    def append(self, text: str, values: Sequence[Value] = (), *, attempt: bool = False) -> int:
        self.writes += 1
        return self._sql.append(text, values, attempt=attempt)

    @override
    def row(self, text: str, values: Sequence[Value] = ()) -> Row | None:
        return self._sql.row(text, values)

    @override
    def rows(self, text: str, values: Sequence[Value] = ()) -> list[Row]:
        return self._sql.rows(text, values)

    @override
    def ask(self, text: str, values: Sequence[Value] = ()) -> Sequence[Row]:
        question = text, tuple(values)
        answer = self._answers.get(question)
        if answer is None:
            answer = tuple(self._sql.rows(text, values))
            if len(self._answers) >= ANSWERS_KEPT:
                self._answers.clear()
            self._answers[question] = answer
        return answer

    @override
    def forget(self) -> None:
        self._answers.clear()
