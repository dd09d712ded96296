"""What the tables ask of a database connection, and how values cross into columns.

The table modules speak portable SQL with ``?`` for values through :class:`Sql`; an adapter implements it, names its own errors
:class:`Duplicate` and :class:`Dangling`, turns what its storage refuses into ``Unavailable``, and text that not every storage can
hold (NUL, lone surrogates) into ``Invalid``: the stores give the same answers.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from broker.errors import Invalid
from broker.spiffe import strictjson

Value: TypeAlias = str | int | bytes | None
Row: TypeAlias = tuple[Any, ...]
T = TypeVar("T")

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


class Duplicate(Exception):
    """A row with this key, or these unique columns, is there already."""


class Dangling(Exception):
    """The row refers to one that is not there."""


class Sql(Protocol):
    """One database connection inside one transaction."""

    def run(self, text: str, values: Sequence[Value] = ()) -> int:
        """Change rows and give their number; Unavailable."""
        ...

    def attempt(self, text: str, values: Sequence[Value] = ()) -> int:
        """Do as ``run`` where a constraint may refuse; Duplicate, Dangling, and the transaction can go on without it."""
        ...

    def row(self, text: str, values: Sequence[Value] = ()) -> Row | None:
        """Give the first row, or None; Unavailable."""
        ...

    def rows(self, text: str, values: Sequence[Value] = ()) -> list[Row]:
        """Give all rows; Unavailable."""
        ...

    def ask(self, text: str, values: Sequence[Value] = ()) -> Sequence[Row]:
        """Give all rows, few of them, of a question that is put again and again; whoever knows the answer need not look."""
        return self.rows(text, values)

    def append(self, text: str, values: Sequence[Value] = (), *, attempt: bool = False) -> int:
        """Do as ``run``, or as ``attempt``, for one new row of a table that nobody asks about by ``ask``."""
        return self.attempt(text, values) if attempt else self.run(text, values)

    def forget(self) -> None:
        """Forget whatever is known of rows: they may have changed."""
        return


class SqlTables:
    """Tables seen through one connection."""

    def __init__(self, sql: Sql) -> None:
        """Read and write through this connection, which lives as long as the adapter says."""
        self._sql = sql


def micros(time: datetime) -> int:
    """Give whole microseconds since 1970: a time comes back as exactly what it was."""
    if time.tzinfo is None:
        raise ValueError("a time without a zone is not stored")
    return (time - _EPOCH) // _MICROSECOND


def micros_or_none(time: datetime | None) -> int | None:
    """Give whole microseconds since 1970, or None for None."""
    return None if time is None else micros(time)


def moment(stored: int) -> datetime:
    """Give the time that was stored, aware, in UTC."""
    return _EPOCH + timedelta(microseconds=stored)


def moment_or_none(stored: int | None) -> datetime | None:
    """Give the time that was stored, or None for None."""
    return None if stored is None else moment(stored)


def text_list(values: Iterable[object]) -> str:
    """Write values as a JSON array of their texts, in the given order."""
    return strictjson.canonical([str(value) for value in values]).decode()


def text_set(values: Iterable[object]) -> str:
    """Write values as a JSON array of their texts, sorted: equal sets give equal text."""
    return strictjson.canonical(sorted(str(value) for value in values)).decode()


def read_list(stored: str, item: Callable[[str], T]) -> tuple[T, ...]:
    """Read a JSON array of texts, each through ``item``; another shape is a damaged row: TypeError, InvalidJson."""
    if stored == "[]":
        return ()
    value = strictjson.loads(stored.encode())
    if not isinstance(value, list):
        raise TypeError("a stored list is not a JSON array")
    return tuple(item(_text(part)) for part in value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a stored list holds something that is not text")
    return value


def digest(text: str) -> str:
    """Give the SHA-256 of a text in hex: a short key for unique columns of any length."""
    return hashlib.sha256(text.encode()).hexdigest()


def not_storable() -> Invalid:
    """Say that a text cannot be kept."""
    return Invalid(
        "a text holds what cannot be stored",
        code="invalid_text",
        hint="leave out NUL characters and lone surrogates",
    )
