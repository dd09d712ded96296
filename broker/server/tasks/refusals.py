"""Every refusal leaves a record too: in its own transaction, and at a bounded rate.

A flood of refusals must not become a flood of writes: beyond the rate they are counted, and the next record says how many
were left out before it. A refusal whose record cannot be written is refused all the same.
"""

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Final

from broker.audit.events import Event, FieldValue, Record
from broker.clock import Clock
from broker.errors import BrokerError, Unavailable
from broker.server.store.ports import Store
from broker.server.tasks.policy.decision import DeniedByPolicy
from broker.server.tasks.records import decided
from broker.server.tasks.requests import Actor

PER_SECOND: Final = 50.0
"""Records a second in the long run: a few percent of what the store can write."""
BURST: Final = 500.0
"""Records at once: a test, a misconfigured fleet or a first attack is seen in full."""

UNKNOWN: Final = "-"
"""The subject of a refusal that came before the subject was known."""


class Refusals:
    """Writes refusals of the task half."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._allowance = BURST
        self._counted_at = clock.monotonic()
        self._left_out = 0

    @asynccontextmanager
    async def recorded(self, event: Event, actor: Actor, subject: str) -> AsyncIterator[None]:
        """Let what happens inside be refused, and record it: ``subject`` is the task or the resource, where it is known."""
        try:
            yield
        except Unavailable:
            # Nobody was refused: nothing was decided.
            raise
        except BrokerError as error:
            told: dict[str, FieldValue] = {
                "door": actor.door.value,
                "session": actor.session,
                "node": None if actor.agent is None else str(actor.agent),
            }
            await self._record(event, str(actor.spiffe_id), subject, error, told)
            raise

    async def note(self, make: Callable[[int], Record]) -> None:
        """Record a refusal of another form; ``make`` is told how many were left out before it."""
        if not self._may_write():
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        record = make(left_out)
        with contextlib.suppress(Unavailable):
            await self._store.write(lambda writer: writer.record(record))

    @asynccontextmanager
    async def recorded_of(self, event: Event, by: str, subject: str) -> AsyncIterator[None]:
        """Do the same for who is no workload: ``by`` is an operator."""
        try:
            yield
        except Unavailable:
            raise
        except BrokerError as error:
            await self._record(event, by, subject, error, {"door": "admin"})
            raise

    async def _record(
        self, event: Event, by: str, subject: str, error: BrokerError, told: Mapping[str, FieldValue]
    ) -> None:
        if not self._may_write():
            self._left_out += 1
            return
        left_out, self._left_out = self._left_out, 0
        fields: dict[str, FieldValue] = {"reason": error.reason, **told}
        if isinstance(error, DeniedByPolicy):
            fields |= decided(error.decision)
        if left_out:
            fields["reasons"] = [f"left_out:{left_out}"]
        record = Record(event, self._clock.now(), by, subject or UNKNOWN, fields)
        with contextlib.suppress(Unavailable):
            await self._store.write(lambda writer: writer.record(record))

    def _may_write(self) -> bool:
        now = self._clock.monotonic()
        self._allowance = min(BURST, self._allowance + (now - self._counted_at) * PER_SECOND)
        self._counted_at = now
        if self._allowance < 1:
            return False
        self._allowance -= 1
        return True
