"""Where authorities change: each change one transaction, and what is in memory is what was committed.

A change is a function over the writer that judges the rows of that moment, not those that its caller saw: another
replica, or an operator through one, may have been faster.
"""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Final

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock
from broker.errors import Conflict
from broker.server.authority.authorities import Authorities, PublicKeys, public_keys
from broker.server.store.ports import Store, Writer, making_nothing_due
from broker.server.store.rows import AuthorityKind, AuthorityRow, AuthorityState, Published
from broker.telemetry.log import get_logger

CHANGE_KIND: Final = "bundle"
"""The change log's word for: the published authorities have changed."""
SERVER: Final = "server"
"""The actor of what is done because it was due."""

log = get_logger("authority")
Alter = Callable[[Writer], bool]
"""Changes rows, and says whether the bundle's content changed."""
TaskKeysHook = Callable[[Writer, PublicKeys], None]


class Journal:
    """The one way to change authorities, and to learn what others changed."""

    def __init__(
        self, store: Store, authorities: Authorities, clock: Clock, *, on_task_keys: TaskKeysHook | None = None
    ) -> None:
        """``on_task_keys`` runs inside the transaction that changes the set of published task-token keys."""
        self._store = store
        self._authorities = authorities
        self._clock = clock
        self._on_task_keys = on_task_keys
        self._turn = asyncio.Lock()

    @property
    def published(self) -> Published:
        """What was committed last, as far as it is known here."""
        return self._authorities.published

    async def refresh(self) -> None:
        """Take in what is committed; raises Unavailable."""
        async with self._turn:
            self._authorities.replace(await self._store.read(lambda reader: reader.published()))

    async def commit(
        self,
        event: Event,
        kind: AuthorityKind,
        subject: str,
        alter: Alter,
        *,
        actor: str = SERVER,
        fields: Mapping[str, FieldValue] | None = None,
    ) -> None:
        """Alter rows, with a record and a change of the log; raises what ``alter`` raises, Unavailable."""
        now = self._clock.now()

        def act(writer: Writer) -> Published:
            if alter(writer):
                if kind is not AuthorityKind.TASK:
                    writer.bump_bundle_sequence()
                elif self._on_task_keys is not None:
                    self._on_task_keys(writer, public_keys(writer.authorities(), kind))
            writer.change(CHANGE_KIND, kind, "")
            writer.record(Record(event, now, actor, subject, fields or {"kind": kind.value}))
            return writer.published()

        async with self._turn:
            # The order of commits is the order of replacements: nothing older comes after something younger.
            published = await self._store.write(act)
            self._authorities.replace(published)
        log.info(event.value, kind=kind.value, authority=subject, bundle_sequence=published.sequence)

    async def beat(self, replica: str, silent_since: datetime) -> None:
        """Say that this replica lives; raises Unavailable."""
        now = self._clock.now()
        await self._store.write(making_nothing_due(lambda writer: writer.see_replica(replica, now, silent_since)))


def find(writer: Writer, kind: AuthorityKind, authority_id: str) -> AuthorityRow | None:
    """Give the row as it is now, or None."""
    return next((row for row in writer.authorities(kind) if row.id == authority_id), None)


def activate(writer: Writer, row: AuthorityRow) -> tuple[AuthorityRow, ...]:
    """Let a prepared authority take over from its replica's active ones, and give those; raises Conflict."""
    current = find(writer, row.kind, row.id)
    if current is None or current.state is not AuthorityState.PREPARED or current.replica != row.replica:
        raise moved()
    replaced = tuple(
        other
        for other in writer.authorities(row.kind)
        if other.state is AuthorityState.ACTIVE and other.replica == row.replica
    )
    for other in replaced:
        writer.put_authority(replace(other, state=AuthorityState.OLD))
    writer.put_authority(replace(current, state=AuthorityState.ACTIVE))
    return replaced


def moved() -> Conflict:
    """Somebody else was faster."""
    return Conflict("the authority has changed in the meantime", code="stale_version", hint="look again and repeat")
